//! Takes rights away from a child process that only computes: a worker, an admission, the rules.
//!
//! - Landlock (`landlock(7)`, Linux 5.13): no file can be opened, but for the description of the processors that an engine reads
//!   to choose its kernels; no TCP connection (Linux 6.7), and no signal or abstract socket to a process outside (Linux 6.12).
//! - seccomp (`seccomp(2)`): no process can be started, no program executed, no socket created, no other process traced or
//!   limited, and no call made through io_uring, which seccomp does not see.
//!
//! A kernel without one of them enforces the other. Descriptors that are open stay usable. The calling thread and those that it
//! starts later are restricted, so a child calls this before it starts threads.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What an engine reads of the system.
const READABLE: [&str; 2] = ["/proc/cpuinfo", "/sys/devices/system/cpu"];

/// What the kernel enforces from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sandbox {
    /// Whether no other file can be opened.
    pub has_no_files: bool,
    /// Whether no process can be started, no program executed and no socket created.
    pub has_no_programs: bool,
}

/// Restricts this thread and those that it starts, as far as the kernel can.
pub fn restrict_myself() -> Sandbox {
    Sandbox { has_no_files: restrict_files(), has_no_programs: restrict_system_calls() }
}

fn restrict_files() -> bool {
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    let restrict = || -> Result<bool, landlock::RulesetError> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        for path in READABLE {
            if let Ok(descriptor) = PathFd::new(path) {
                let access = if Path::new(path).is_dir() { read } else { AccessFs::ReadFile.into() };
                ruleset = ruleset.add_rule(PathBeneath::new(descriptor, access))?;
            }
        }
        Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
    };
    restrict().unwrap_or(false)
}

/// The numbers of the system calls of the x32 ABI are those of x86-64 with this bit, under the same architecture.
#[cfg(target_arch = "x86_64")]
const X32_BIT: i64 = 0x4000_0000;

fn restrict_system_calls() -> bool {
    // glibc starts threads with clone3, whose flags a filter cannot read. Without it, it uses clone.
    let unknown = u32::try_from(libc::ENOSYS).unwrap_or(1);
    let permission = u32::try_from(libc::EPERM).unwrap_or(1);
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    apply(no_clone3, unknown) && denied_calls().is_ok_and(|denied| apply(denied, permission))
}

/// What a child must not call, with conditions on the arguments.
fn denied_calls() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let always = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_socket,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_keyctl,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_fork,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork,
    ];
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> = always.into_iter().map(|call| (call, Vec::new())).collect();
    // A process, and not a thread.
    let thread = libc::CLONE_THREAD as u64;
    let is_process = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), 0)?;
    denied.insert(libc::SYS_clone, vec![SeccompRule::new(vec![is_process])?]);
    // The limits of another process.
    let is_other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, 0)?;
    denied.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![is_other])?]);
    #[cfg(target_arch = "x86_64")]
    denied.extend(denied.clone().into_iter().map(|(call, rules)| (call | X32_BIT, rules)));
    Ok(denied)
}

/// Makes calls fail with an error number on this thread and those that it starts.
fn apply(denied: BTreeMap<i64, Vec<SeccompRule>>, error: u32) -> bool {
    let Ok(architecture) = TargetArch::try_from(std::env::consts::ARCH) else { return false };
    let filter = SeccompFilter::new(denied, SeccompAction::Allow, SeccompAction::Errno(error), architecture);
    let Some(program) = filter.ok().and_then(|filter| BpfProgram::try_from(filter).ok()) else { return false };
    seccompiler::apply_filter(&program).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restricted_thread_opens_no_file_executes_nothing_and_creates_no_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, "secret").unwrap();
        let mut open = std::fs::File::open(&path).unwrap();
        let restricted = std::thread::spawn(move || {
            let sandbox = restrict_myself();
            if sandbox.has_no_files {
                assert!(std::fs::read(&path).is_err(), "a file was read");
                assert!(std::fs::write(path.with_extension("new"), "x").is_err(), "a file was written");
                assert!(std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| !text.is_empty()));
                let mut text = String::new();
                std::io::Read::read_to_string(&mut open, &mut text).unwrap();
                assert_eq!(text, "secret", "an open file stays usable");
            }
            if sandbox.has_no_programs {
                assert!(std::process::Command::new("/bin/true").status().is_err(), "a program was executed");
                assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err(), "a socket was created");
                let other = rustix::process::Pid::from_raw(1);
                let unlimited = rustix::process::Rlimit { current: None, maximum: None };
                let error = rustix::process::prlimit(other, rustix::process::Resource::Core, unlimited).err();
                assert_eq!(error, Some(rustix::io::Errno::PERM), "another process was limited");
            }
            let inner = std::thread::spawn(|| std::fs::read("/etc/hostname").is_err()).join().unwrap();
            assert!(inner || !sandbox.has_no_files, "threads that it starts are restricted too");
            sandbox
        });
        let sandbox = restricted.join().unwrap();
        if sandbox != (Sandbox { has_no_files: true, has_no_programs: true }) {
            eprintln!("this kernel enforces only a part: {sandbox:?}");
        }
        assert!(std::fs::read_to_string("/proc/cpuinfo").is_ok(), "other threads are not restricted");
    }
}
