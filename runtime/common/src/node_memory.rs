//! The memory that this process and its children may use: the smallest limit of its control groups, or the memory of the node.
//!
//! Control groups v2 (`memory.max`) and v1 (`memory.limit_in_bytes`) are read for the group of the process and all groups above
//! it. In a container, the files of the process's own group stand at the root of `/sys/fs/cgroup`.

use std::path::{Path, PathBuf};

/// The memory limit in bytes; `None` where it cannot be found.
pub fn limit_bytes() -> Option<u64> {
    limit_below(Path::new("/"))
}

fn limit_below(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().flat_map(|line| limits_of(root, line));
    limits.chain(installed(root)).min()
}

/// The limits that a line of `/proc/self/cgroup` leads to: `hierarchy:controllers:path`.
fn limits_of(root: &Path, line: &str) -> Vec<u64> {
    let mut parts = line.splitn(3, ':');
    let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        return Vec::new();
    };
    let (base, file) = if controllers.is_empty() {
        ("sys/fs/cgroup", "memory.max")
    } else if controllers.split(',').any(|controller| controller == "memory") {
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
    } else {
        return Vec::new();
    };
    let base = root.join(base);
    let mut group: PathBuf = base.join(path.trim_start_matches('/'));
    let mut limits = Vec::new();
    while group.starts_with(&base) {
        // `max` means no limit and is not parsed; v1 states a number near 2^63.
        let text = std::fs::read_to_string(group.join(file)).unwrap_or_default();
        limits.extend(text.trim().parse::<u64>());
        if !group.pop() {
            break;
        }
    }
    limits
}

/// The memory of the node.
fn installed(root: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_smallest_limit_of_all_groups_counts() {
        let memory = ("proc/meminfo", "MemTotal:       16000 kB\nMemFree: 1 kB\n");
        let v2 = tree(&[
            memory,
            ("proc/self/cgroup", "0::/kubepods/pod1/c1\n"),
            ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", "max\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "5000\n"),
            ("sys/fs/cgroup/kubepods/memory.max", "9000\n"),
        ]);
        assert_eq!(limit_below(v2.path()), Some(5000));
        let v1 = tree(&[
            memory,
            ("proc/self/cgroup", "9:cpu,cpuacct:/x\n8:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "7000"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
        ]);
        assert_eq!(limit_below(v1.path()), Some(7000));
        assert_eq!(limit_below(tree(&[memory]).path()), Some(16_000 * 1024));
        assert_eq!(limit_below(tree(&[]).path()), None);
    }

    #[test]
    fn damaged_files_are_ignored() {
        let root =
            tree(&[("proc/self/cgroup", "0:\n::::\nnothing\n0::/../../..\n"), ("proc/meminfo", "MemTotal: x\n")]);
        assert_eq!(limit_below(root.path()), None);
    }
}
