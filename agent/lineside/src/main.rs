//! The `lineside` program. It calls the command line of the library.

fn main() -> std::process::ExitCode {
    lineside::cli::main()
}
