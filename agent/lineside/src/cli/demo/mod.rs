//! `lineside demo`: runs the whole agent on this machine, with a bundled broker, model and frames.
//!
//! The demo uses the same code paths as a node. It writes manifests, model and frames to a temporary folder, starts a broker on
//! a free port of the loopback interface, starts the agent as `lineside run` does, and prints the messages that an MQTT
//! subscriber of this broker receives. `tests/suite/command_line.rs` tests it as a whole process.

mod bundle;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::app::App;
use crate::config::probes::{ProbesSetting, ReadinessMode};
use crate::config::settings::{Config, DesiredSource};
use crate::config::sources::SourcesConfig;
use crate::telemetry::SetLevel;
use lineside_api::message::Topics;
use lineside_common::{files, shutdown};
use lineside_models::ModelsConfig;
use lineside_mqtt::config::{Broker, MqttConfig};
use lineside_mqtt::connection;
use lineside_mqtt::connection::ConnectionEvent;
use lineside_mqtt::credentials::BrokerCredentials;
use lineside_mqtt::loopback::LoopbackBroker;
use lineside_spool::SpoolConfig;

const MODEL_NAME: &str = "surface-defects";
const STREAM_NAME: &str = "line-1";
const KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Args)]
pub(super) struct Arguments {
    /// Stop after this number of results; 0 means run until Ctrl-C.
    #[arg(long, value_name = "N", default_value_t = 0)]
    results: u64,
    /// Frames per second of the simulated camera, 0 to 1000; 0 means as fast as the model runs.
    #[arg(long, default_value_t = 5.0)]
    fps: f64,
    /// Print each result message as one line of JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments, set_level: SetLevel) -> Result<(), Failure> {
    if !(0.0..=1000.0).contains(&arguments.fps) {
        return Err(Failure::Usage(vec![format!("--fps: {} is not between 0 and 1000", arguments.fps)]));
    }
    files::private_by_default();
    let runtime = super::runtime()?;
    let outcome = runtime.block_on(run_demo(&arguments, set_level));
    runtime.shutdown_background();
    outcome.map_err(Failure::Failed)
}

/// Runs the agent and the subscriber until the requested results have arrived, a signal arrives or a task fails.
async fn run_demo(arguments: &Arguments, set_level: SetLevel) -> anyhow::Result<()> {
    let folder =
        tempfile::Builder::new().prefix("lineside-demo-").tempdir().context("cannot create a temporary folder")?;
    write_files(folder.path(), arguments.fps).context("cannot write the files of the demo")?;
    let stop = CancellationToken::new();
    shutdown::on_signals(stop.clone()).context("cannot install the signal handlers")?;
    let address = LoopbackBroker::start().await.context("cannot start the broker of the demo")?.address();
    let broker = Broker { host: address.ip().to_string(), port: address.port(), tls: false, credentials: None };
    let desired_state = DesiredSource::Folder(folder.path().join("manifests"));
    let data_dir = folder.path().join("data");
    let sources = SourcesConfig::new(&desired_state, &data_dir);
    let config = Config {
        node: "demo-node".to_owned(),
        site: "demo".to_owned(),
        prefix: "lineside".to_owned(),
        desired_state,
        data_dir,
        mqtt: MqttConfig::new(broker.clone()),
        http: ([127, 0, 0, 1], 0).into(),
        probes: ProbesSetting::Off,
        readiness: ReadinessMode::default(),
        labels: BTreeMap::new(),
        spool: SpoolConfig::default(),
        models: ModelsConfig { file_roots: sources.policy.files.clone(), ..ModelsConfig::default() },
        sources,
    };
    let topics = Topics::new(&config.prefix, &config.site, &config.node);
    let app = App::start(config, set_level).await?;
    eprintln!("A node with one camera, one model and a broker is running on this machine.");
    eprintln!();
    eprintln!("  results   mosquitto_sub -h {} -p {} -v -t '{}'", address.ip(), address.port(), topics.all());
    eprintln!("  metrics   http://{}/metrics   (also /readyz and /livez)", app.http());
    eprintln!("  manifests {}", folder.path().join("manifests").display());
    eprintln!();
    eprintln!("Changed manifests apply while the demo runs. The first results also contain the time");
    eprintln!("in which the frames waited for the model to load.");
    eprintln!();
    let mut table = Table::new();
    let outcome = tokio::select! {
        outcome = print_results(arguments, &broker, &topics, &mut table) => outcome,
        () = stop.cancelled() => Ok(()),
        failure = app.failed() => Err(failure.into()),
    };
    if table.results > 0 {
        eprintln!("\n{}", table.summary());
    }
    app.stop().await;
    outcome
}

/// Writes the model, the frames and the manifests.
fn write_files(folder: &Path, fps: f64) -> std::io::Result<()> {
    for inner in ["manifests", "frames"] {
        std::fs::create_dir(folder.join(inner))?;
    }
    std::fs::write(folder.join("model.onnx"), bundle::MODEL)?;
    for (name, jpeg) in bundle::FRAMES {
        std::fs::write(folder.join("frames").join(name), jpeg)?;
    }
    let model = format!(
        "# The model: a classifier of metal parts. Its task, labels and input size are metadata of the ONNX file.\n\
         apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: {MODEL_NAME}}}\nspec:\n  version: 1\n  \
         source: {{uri: file:../model.onnx}}\n"
    );
    let stream = format!(
        "# The camera: a folder of images, played in a loop. Change fps or verdict to see the effect.\n\
         apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {STREAM_NAME}}}\nspec:\n  \
         source: {{uri: 'dir:../frames?loop=true'}}\n  model: {MODEL_NAME}\n  fps: {fps}\n  \
         verdict: 'classes[0].label == \"good\" ? \"pass\" : \"reject\"'\n"
    );
    std::fs::write(folder.join("manifests/model.yaml"), model)?;
    std::fs::write(folder.join("manifests/stream.yaml"), stream)
}

/// Subscribes to the results as any MQTT client does, and prints each of them.
async fn print_results(
    arguments: &Arguments,
    broker: &Broker,
    topics: &Topics,
    table: &mut Table,
) -> anyhow::Result<()> {
    let (mut sender, mut receiver) =
        connection::prepare::<()>(broker, &BrokerCredentials::default(), "lineside-demo-terminal", KEEP_ALIVE, None);
    let mut stdout = std::io::stdout();
    loop {
        match sender.interpret(receiver.next().await) {
            ConnectionEvent::Connected if !sender.subscribe(&topics.result("+")) => {
                anyhow::bail!("cannot subscribe to the results at the broker of the demo")
            }
            ConnectionEvent::Received(message) => {
                let result: Value = serde_json::from_slice(&message.payload).context("a result is not valid JSON")?;
                table.count(&result);
                let line = if arguments.json { result.to_string() } else { table.row(&result) };
                // The reader may close the pipe at any time, as `head` does.
                if writeln!(stdout, "{line}").is_err() {
                    return Ok(());
                }
                if table.results == arguments.results {
                    return Ok(());
                }
            }
            ConnectionEvent::Lost(loss) => {
                anyhow::bail!("the connection to the broker of the demo was lost: {}", loss.reason())
            }
            _ => {}
        }
    }
}

/// The printed table of results and its totals.
struct Table {
    results: u64,
    verdicts: BTreeMap<String, u64>,
    /// Number of results whose best class is the class in the name of the frame.
    correct: u64,
    /// Inference time of each result, in milliseconds.
    infer_ms: Vec<f64>,
    in_colour: bool,
}

impl Table {
    fn new() -> Self {
        let in_colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { results: 0, verdicts: BTreeMap::new(), correct: 0, infer_ms: Vec::new(), in_colour }
    }

    fn count(&mut self, result: &Value) {
        self.results += 1;
        *self.verdicts.entry(text(result, "/verdict").to_owned()).or_default() += 1;
        let true_class = text(result, "/frame/name").trim_end_matches(".jpg").rsplit('-').next().unwrap_or_default();
        self.correct += u64::from(true_class == text(result, "/classes/0/label"));
        self.infer_ms.push(number(result, "/latency_ms/infer"));
    }

    fn row(&self, result: &Value) -> String {
        let mut out = String::new();
        if self.results % 20 == 1 {
            out = format!(
                "{:<12} {:>5} {:<20} {:<8} {:>5} {:<7} {:>8} {:>8}\n",
                "TIME", "SEQ", "FRAME", "CLASS", "SCORE", "VERDICT", "INFER ms", "TOTAL ms"
            );
        }
        let verdict = text(result, "/verdict");
        let colour = match verdict {
            "reject" => "31",
            "pass" => "32",
            _ => "33",
        };
        let verdict = format!("{verdict:<7}");
        let verdict = if self.in_colour { format!("\x1b[{colour}m{verdict}\x1b[0m") } else { verdict };
        out + &format!(
            "{:<12} {:>5} {:<20} {:<8} {:>5.3} {verdict} {:>8.1} {:>8.1}",
            text(result, "/ts").get(11..23).unwrap_or_default(),
            number(result, "/seq"),
            text(result, "/frame/name"),
            text(result, "/classes/0/label"),
            number(result, "/classes/0/score"),
            number(result, "/latency_ms/infer"),
            number(result, "/latency_ms/total"),
        )
    }

    fn summary(&self) -> String {
        let mut infer = self.infer_ms.clone();
        infer.sort_by(f64::total_cmp);
        let median = infer.get(infer.len() / 2).copied().unwrap_or_default();
        let verdicts: Vec<String> = self.verdicts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
        format!(
            "{} results over MQTT: {}. {} of them match the class in the name of the frame. Median inference {median:.1} ms.",
            self.results,
            verdicts.join(", "),
            self.correct
        )
    }
}

fn text<'a>(result: &'a Value, pointer: &str) -> &'a str {
    result.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(result: &Value, pointer: &str) -> f64 {
    result.pointer(pointer).and_then(Value::as_f64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_eighty_columns() {
        let mut table = Table { in_colour: false, ..Table::new() };
        let result = serde_json::json!({
            "ts": "2026-11-27T18:35:56.123Z", "seq": 99_999, "verdict": "reject", "frame": {"name": "part-012-scratch.jpg"},
            "classes": [{"label": "scratch", "score": 0.987}], "latency_ms": {"infer": 12_345.6, "total": 99_999.9}
        });
        table.count(&result);
        let lines = table.row(&result);
        assert!(lines.lines().count() == 2 && lines.lines().all(|line| line.chars().count() <= 80), "{lines}");
        assert!(table.summary().contains("1 results over MQTT: 1 reject. 1 of them match"), "{}", table.summary());
    }
}
