//! From the desired and the observed state to the next steps. A pure function.
//!
//! A model that fails to load leaves whatever served before it in place. A version below the highest that ever served on
//! this node is refused unless its manifest says `rollback: true`; so is, where the highest version is not known, every version
//! but the one that served last. Where nothing serves, what served last (`last_good`) is
//! restored from the store first, which needs no network; when the very same manifest is wanted, it is loaded, and only
//! restored when that fails. StreamStates are simpler: one that differs in anything is stopped and started.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::desired::Assignment;
use lineside_api::kinds::{ModelManifest, StreamManifest};
use lineside_models::last_good::HighestVersion;

/// What the deploy task knows of a model.
#[derive(Debug, Clone, Default)]
pub(super) struct ObservedModel {
    /// The manifest that serves.
    pub serving: Option<ModelManifest>,
    /// The manifest being loaded.
    pub loading: Option<ModelManifest>,
    /// The manifest that failed last, and when it may be tried again; never, where that is `None`.
    pub failed: Option<(ModelManifest, Option<Instant>)>,
    /// The manifest that was refused for its version.
    pub refused: Option<ModelManifest>,
    /// The manifest that served last, where the store still has it.
    pub last_good: Option<ModelManifest>,
    /// After a failed attempt to restore it: when the next one may be made.
    pub restore_at: Option<Instant>,
    /// The highest version that ever served here.
    pub highest: HighestVersion,
}

impl ObservedModel {
    /// Whether it does not wait for the restoration of what served last: a version serves, there is none to restore, or an
    /// attempt has failed.
    pub(super) fn is_restored(&self) -> bool {
        self.serving.is_some() || self.last_good.is_none() || self.restore_at.is_some()
    }

    /// Whether nothing of it runs, is being loaded, or has failed.
    pub(super) fn is_idle(&self) -> bool {
        self.serving.is_none() && self.loading.is_none() && self.failed.is_none()
    }
}

/// What is.
#[derive(Debug, Default)]
pub(super) struct ObservedState {
    /// Models that are loaded, being loaded, or have failed.
    pub models: BTreeMap<String, ObservedModel>,
    /// StreamStates that run.
    pub streams: BTreeMap<String, StreamManifest>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// Load a model beside whatever serves under its name.
    Load(ModelManifest),
    /// Load what served last from the store, because nothing serves.
    Restore(ModelManifest),
    /// Say that a version is lower than one that has served, or may be, and do nothing else.
    Refuse {
        /// The manifest that is not followed.
        manifest: ModelManifest,
        /// The highest version that ever served here; `None` when it is not known.
        highest: Option<u64>,
    },
    /// Stop serving a model.
    Unload(String),
    /// Start a stream.
    Start(StreamManifest),
    /// Stop a stream.
    Stop(String),
}

/// The steps from `observed` to `desired`. StreamStates stop before anything else, and start last.
pub(super) fn plan(desired: &Assignment, observed: &ObservedState, now: Instant) -> Vec<Step> {
    let mut steps = Vec::new();
    for (name, running) in &observed.streams {
        if desired.streams.get(name) != Some(running) {
            steps.push(Step::Stop(name.clone()));
        }
    }
    for (name, model) in &observed.models {
        // What is being loaded is waited for: its threads start when it is done, and somebody has to end them.
        if model.loading.is_none() && !model.is_idle() && !desired.models.contains_key(name) {
            steps.push(Step::Unload(name.clone()));
        }
    }
    let unknown = ObservedModel::default();
    for (name, wanted) in &desired.models {
        steps.extend(model_step(wanted, observed.models.get(name).unwrap_or(&unknown), now));
    }
    for (name, wanted) in &desired.streams {
        if observed.streams.get(name) != Some(wanted) {
            steps.push(Step::Start(wanted.clone()));
        }
    }
    steps
}

fn model_step(wanted: &ModelManifest, model: &ObservedModel, now: Instant) -> Option<Step> {
    if model.loading.is_some() || model.serving.as_ref() == Some(wanted) {
        return None;
    }
    let has_failed = model.failed.as_ref().is_some_and(|(failed, _)| failed == wanted);
    if model.serving.is_none()
        && model.restore_at.is_none_or(|restore_at| now >= restore_at)
        && let Some(last_good) = model.last_good.as_ref().filter(|last_good| has_failed || *last_good != wanted)
    {
        return Some(Step::Restore(last_good.clone()));
    }
    let known = [&model.serving, &model.last_good].into_iter().flatten().map(|manifest| manifest.version).max();
    let highest = match model.highest {
        HighestVersion::None => known,
        HighestVersion::Version(highest) => known.max(Some(highest)),
        HighestVersion::Unknown => None,
    };
    let is_refused = match model.highest {
        // Of any other version it is not known whether it is a downgrade.
        HighestVersion::Unknown => known != Some(wanted.version),
        _ => highest.is_some_and(|highest| wanted.version < highest),
    };
    if is_refused && !wanted.rollback {
        let already_said = model.refused.as_ref() == Some(wanted);
        return (!already_said).then(|| Step::Refuse { manifest: wanted.clone(), highest });
    }
    match &model.failed {
        Some((failed, retry_at)) if failed == wanted && retry_at.is_none_or(|retry_at| now < retry_at) => None,
        _ => Some(Step::Load(wanted.clone())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::desired::Node;
    use lineside_api::kinds::manifest::read;

    fn model(version: u64, more: &str) -> String {
        format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: EdgeModel\nmetadata: {{name: m}}\n\
             spec: {{version: {version}, source: {{uri: 'file:m.onnx'}}{more}}}\n---\n"
        )
    }

    fn stream(name: &str, more: &str) -> String {
        format!(
            "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {{name: {name}}}\n\
             spec: {{source: {{uri: 'dir:f'}}, model: m{more}}}\n---\n"
        )
    }

    fn desired(text: &str) -> Assignment {
        let node = Node { name: "edge-3".to_owned(), labels: BTreeMap::from([("line".to_owned(), "a".to_owned())]) };
        Assignment::new(read(text, Path::new("/"), &|_| Ok(())).unwrap(), &node)
    }

    fn serving(text: &str) -> ObservedState {
        let desired = desired(text);
        let models = desired
            .models
            .into_iter()
            .map(|(name, manifest)| (name, ObservedModel { serving: Some(manifest), ..Default::default() }))
            .collect();
        ObservedState { models, streams: desired.streams }
    }

    #[test]
    fn what_is_as_it_should_be_needs_no_step() {
        let text = model(1, "") + &stream("s", "");
        assert_eq!(plan(&desired(&text), &serving(&text), Instant::now()), []);
    }

    #[test]
    fn only_what_changed_is_touched() {
        let before = model(1, "") + &stream("a", "") + &stream("b", "");
        let after = model(2, "") + &stream("a", "") + &stream("b", ", fps: 5") + &stream("c", "");
        let steps = plan(&desired(&after), &serving(&before), Instant::now());
        let names: Vec<String> = steps
            .iter()
            .map(|step| match step {
                Step::Load(model) => format!("load {}", model.version),
                Step::Stop(name) => format!("stop {name}"),
                Step::Start(stream) => format!("start {}", stream.name),
                other => format!("{other:?}"),
            })
            .collect();
        assert_eq!(names, ["stop b", "load 2", "start b", "start c"]);
        let gone = plan(&Assignment::default(), &serving(&before), Instant::now());
        assert_eq!(gone, [Step::Stop("a".into()), Step::Stop("b".into()), Step::Unload("m".into())]);
    }

    #[test]
    fn while_the_highest_version_is_not_known_only_what_served_last_is_loaded() {
        let refused = |observed: &ObservedState, text: &str| {
            let steps = plan(&desired(text), observed, Instant::now());
            matches!(steps.as_slice(), [Step::Refuse { highest: None, .. }])
        };
        let mut observed = serving(&model(2, ""));
        observed.models.get_mut("m").unwrap().highest = HighestVersion::Unknown;
        for version in [1, 3] {
            assert!(refused(&observed, &model(version, "")), "{version}");
            let back = model(version, ", rollback: true");
            assert!(matches!(plan(&desired(&back), &observed, Instant::now()).as_slice(), [Step::Load(_)]));
        }
        // Another spec of the version that serves is not a downgrade.
        assert!(!refused(&observed, &model(2, ", task: classify")));
        let unknown = ObservedModel { highest: HighestVersion::Unknown, ..ObservedModel::default() };
        let fresh = ObservedState { models: BTreeMap::from([("m".to_owned(), unknown)]), streams: BTreeMap::new() };
        assert!(refused(&fresh, &model(1, "")));
    }

    #[test]
    fn a_lower_version_is_refused_once_unless_it_is_a_rollback() {
        let mut observed = serving(&model(3, ""));
        let lower = desired(&model(2, ""));
        let steps = plan(&lower, &observed, Instant::now());
        assert!(matches!(steps.as_slice(), [Step::Refuse { highest: Some(3), .. }]), "{steps:?}");
        observed.models.get_mut("m").unwrap().refused = lower.models.get("m").cloned();
        assert_eq!(plan(&lower, &observed, Instant::now()), []);
        let back = plan(&desired(&model(2, ", rollback: true")), &observed, Instant::now());
        assert!(matches!(back.as_slice(), [Step::Load(_)]), "{back:?}");
    }

    #[test]
    fn a_failed_model_waits_for_its_time_and_an_edit_does_not() {
        let now = Instant::now();
        let wanted = desired(&model(1, ""));
        let mut observed = ObservedState::default();
        let failed = Some((wanted.models["m"].clone(), Some(now + Duration::from_secs(5))));
        observed.models.insert("m".to_owned(), ObservedModel { failed, ..Default::default() });
        assert_eq!(plan(&wanted, &observed, now), []);
        assert_eq!(plan(&wanted, &observed, now + Duration::from_secs(6)).len(), 1);
        assert_eq!(plan(&desired(&model(1, ", task: detect")), &observed, now).len(), 1);
        assert_eq!(plan(&Assignment::default(), &observed, now), [Step::Unload("m".into())]);
    }

    #[test]
    fn what_served_last_is_restored_before_anything_that_may_need_the_network() {
        let now = Instant::now();
        let manifest = |text: &str| desired(text).models["m"].clone();
        let observed = |last_good: &str, failed: Option<&str>| {
            let failed = failed.map(|text| (manifest(text), None));
            let last_good = Some(manifest(last_good));
            let model = ObservedModel { last_good, failed, highest: HighestVersion::Version(2), ..Default::default() };
            ObservedState { models: BTreeMap::from([("m".to_owned(), model)]), ..Default::default() }
        };
        let (one, two, three) = (model(1, ""), model(2, ""), model(3, ""));
        let steps = |wanted: &str, observed: &ObservedState| plan(&desired(wanted), observed, now);
        assert_eq!(steps(&three, &observed(&two, None)), [Step::Restore(manifest(&two))]);
        assert_eq!(steps(&two, &observed(&two, None)), [Step::Load(manifest(&two))], "the same is loaded");
        assert_eq!(steps(&two, &observed(&two, Some(&two))), [Step::Restore(manifest(&two))], "until that fails");
        // A lower version is refused although nothing of it serves, and what served last is restored all the same.
        assert_eq!(steps(&one, &observed(&two, None)), [Step::Restore(manifest(&two))]);
        let mut gone = observed(&two, None);
        gone.models.get_mut("m").unwrap().last_good = None;
        assert!(matches!(steps(&one, &gone).as_slice(), [Step::Refuse { highest: Some(2), .. }]));
        let mut later = observed(&two, None);
        later.models.get_mut("m").unwrap().restore_at = Some(now + Duration::from_secs(9));
        assert_eq!(steps(&three, &later), [Step::Load(manifest(&three))], "what cannot be restored now waits");
        // Quarantined: never tried again by itself.
        let mut failed = observed(&two, Some(&three));
        failed.models.get_mut("m").unwrap().last_good = None;
        assert_eq!(steps(&three, &failed), []);
    }

    #[test]
    fn nothing_is_decided_while_a_model_loads() {
        let mut observed = serving(&model(1, ""));
        observed.models.get_mut("m").unwrap().loading = desired(&model(2, "")).models.get("m").cloned();
        assert_eq!(plan(&desired(&model(3, "")), &observed, Instant::now()), []);
        assert_eq!(plan(&Assignment::default(), &observed, Instant::now()), []);
    }

    #[test]
    fn manifests_for_other_nodes_are_left_out() {
        let text = model(1, ", nodeSelector: {line: b}")
            + &stream("here", ", nodeName: edge-3, nodeSelector: {line: a}")
            + &stream("there", ", nodeName: edge-4");
        let desired = desired(&text);
        assert!(desired.models.is_empty());
        assert_eq!(desired.streams.keys().collect::<Vec<_>>(), ["here"]);
    }
}
