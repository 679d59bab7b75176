//! `lineside crd`: the definitions of our kinds.

use anyhow::Context as _;
use clap::Args;

use super::{Failure, write_out};
use lineside_api::kinds::yaml::to_yaml;
use lineside_kube::definitions;

#[derive(Args)]
#[command(after_help = "\
The output is YAML for the cluster:
  lineside crd | kubectl apply --server-side -f -")]
pub(super) struct Arguments {
    /// Print a JSON list instead of YAML.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let text = match arguments.json {
        true => json()?,
        false => yaml()?,
    };
    write_out(text.trim_end());
    Ok(())
}

fn json() -> anyhow::Result<String> {
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": definitions()?});
    serde_json::to_string_pretty(&list).context("the definitions cannot be written down")
}

/// The definitions as one YAML file.
fn yaml() -> anyhow::Result<String> {
    let mut text =
        "# Made by `lineside crd`. Change agent/src/cluster/kinds.rs and what it names, then run `make generate`.\n"
            .to_owned();
    for definition in definitions()? {
        text += "---\n";
        text += &to_yaml(&definition).context("the definitions cannot be written down")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn the_committed_definitions_are_those_of_the_code() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../edge-manifests/base/crds.yaml");
        let text = super::yaml().unwrap();
        if std::env::var_os("LINESIDE_UPDATE_GENERATED").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            return;
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(committed, text, "run `make generate` and commit what it wrote");
    }
}
