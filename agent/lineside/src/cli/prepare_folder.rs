//! `lineside prepare-folder`: gives the data folder of a node to the user of the agent, with the mode 0700. The component
//! `prepare-nodes` of edge-manifests runs it on every edge node, as root with the capabilities CHOWN and FOWNER alone.
//!
//! Only the folder itself is changed, not what is in it. A folder that is right already is not touched.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Failure, write_out};
use lineside_common::shutdown;

/// Access for the owner alone.
const MODE: u32 = 0o700;

#[derive(Args)]
#[command(after_help = "\
Example, the same as `install -d -o 65532 -g 65532 -m 0700 /var/lib/lineside`:
  lineside prepare-folder /var/lib/lineside")]
pub(super) struct Arguments {
    /// Folder to prepare. It is created if its parent exists.
    folder: PathBuf,
    /// User and group of the agent, by number.
    #[arg(long, value_name = "USER:GROUP", default_value = "65532:65532", value_parser = owner_of)]
    owner: (u32, u32),
    /// Keep running until a signal arrives, as a DaemonSet requires.
    #[arg(long)]
    wait: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let folder = &arguments.folder;
    let changed = prepare(folder, arguments.owner).with_context(|| format!("cannot prepare {}", folder.display()))?;
    let (user, group) = arguments.owner;
    let state = if changed { "now belongs" } else { "belongs" };
    write_out(&format!("{} {state} to {user}:{group} with the mode 0700", folder.display()));
    if arguments.wait {
        super::runtime()?.block_on(async {
            let stop = CancellationToken::new();
            shutdown::on_signals(stop.clone()).context("cannot install the signal handlers")?;
            stop.cancelled().await;
            anyhow::Ok(())
        })?;
    }
    Ok(())
}

/// Creates the folder if necessary, and sets its owner and mode. Returns whether anything was changed.
fn prepare(folder: &Path, owner: (u32, u32)) -> io::Result<bool> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // A link would lead the change of the owner to another place of the node.
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a folder"));
    }
    let is_owned = (found.uid(), found.gid()) == owner;
    let is_private = found.mode() & 0o7777 == MODE;
    if !is_owned {
        lchown(folder, Some(owner.0), Some(owner.1))?;
    }
    if !is_private {
        fs::set_permissions(folder, Permissions::from_mode(MODE))?;
    }
    Ok(!is_owned || !is_private)
}

fn owner_of(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':').and_then(|(user, group)| Some((user.parse().ok()?, group.parse().ok()?)));
    numbers.ok_or_else(|| format!("`{text}` is not a user and a group by number, such as 65532:65532"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The user and group of this process: only root may give a folder to somebody else.
    fn own() -> (u32, u32) {
        let process = fs::metadata("/proc/self").unwrap();
        (process.uid(), process.gid())
    }

    #[test]
    fn a_folder_is_created_restricted_and_then_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("data");
        assert!(prepare(&folder, own()).unwrap());
        fs::write(folder.join("kept"), "content").unwrap();
        assert!(!prepare(&folder, own()).unwrap());
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        assert!(prepare(&folder, own()).unwrap());
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, MODE);
        assert_eq!(fs::read_to_string(folder.join("kept")).unwrap(), "content");
        if own().0 == 0 {
            assert!(prepare(&folder, (65532, 65532)).unwrap());
            let given = fs::metadata(&folder).unwrap();
            assert_eq!((given.uid(), given.gid(), given.mode() & 0o7777), (65532, 65532, MODE));
        }
    }

    #[test]
    fn links_files_and_missing_parents_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        let (file, link) = (parent.path().join("file"), parent.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        for path in [file, link, parent.path().join("missing/data")] {
            assert!(prepare(&path, own()).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn owners_are_numbers() {
        assert_eq!(owner_of("7:8"), Ok((7, 8)));
        for text in ["", "7", "lineside:lineside", "7:", "-1:0", "7:8:9"] {
            assert!(owner_of(text).is_err(), "{text}");
        }
    }
}
