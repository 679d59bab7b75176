//! The `lineside` program. Everything is in the library; this only hands over.

fn main() -> std::process::ExitCode {
    lineside::cli::main()
}
