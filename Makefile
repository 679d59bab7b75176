# The developer's commands. `make help` lists them.

# All crates are always built together: with `-p` cargo would pick other features for shared dependencies, and compile
# tract (several minutes) once more.
CARGO ?= cargo
RESULTS ?= 100
# Many tests wait for something most of the time.
export RUST_TEST_THREADS ?= 4
APT_PACKAGES := mosquitto mosquitto-clients ffmpeg prometheus python3-venv docker-registry openssl
LAB_PACKAGES := containerd runc containernetworking-plugins nftables conntrack iproute2 openssl curl ca-certificates faketime dnsmasq-base
LAB ?= target/lab/demo
TOOLS := mosquitto_sub ffmpeg promtool docker-registry openssl
VENV := .venv
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help compiler demo build image test test-tools lab-tools lab-up lab-down lab-demo fleet check deny generate bench experiments figures fmt clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# rustup's toolchain links with the system's C compiler.
compiler:
	@command -v cc >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy gcc libc6-dev; }

demo: compiler ## Build, and show the main job on this machine (RESULTS=0 goes on until Ctrl-C)
	$(CARGO) build --workspace
	target/debug/lineside demo --results $(RESULTS)

build: compiler ## The release binary: target/release/lineside
	$(CARGO) build --release --workspace

image: compiler ## The container image for K3s: dist/lineside-VERSION-amd64.oci.tar (and arm64 where its compiler is installed)
	cross/image.sh amd64 release
	@if command -v aarch64-linux-gnu-gcc /usr/bin/cargo >/dev/null; then cross/image.sh arm64 release; \
	else echo 'no image for arm64: apt-get install rustc-web cargo-web rust-web-src gcc-aarch64-linux-gnu libc6-dev-arm64-cross'; fi

test: compiler test-tools lab-tools ## Install what the tests need, and run all of them
	$(CARGO) test --workspace

test-tools: $(VENV)/.installed ## Install mosquitto, ffmpeg, promtool, docker-registry, openssl (Debian) and Python packages, where missing
	@for tool in $(TOOLS); do command -v $$tool >/dev/null || missing=1; done; \
	command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || missing=1; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -qy --no-install-recommends $(APT_PACKAGES); \
	fi

# The lab needs root and its own network; where it cannot be had, the tests of the cluster say that they were skipped.
lab-tools: compiler ## Build the lab's Kubernetes (once, minutes) and the image that its tests run; install what it needs
	@if [ "$$(id -u)" != 0 ]; then echo 'no lab: it takes root'; else \
	for tool in containerd runc nft conntrack ip openssl curl faketime dnsmasq; do command -v $$tool >/dev/null || missing=1; done; \
	if [ -n "$$missing" ] || [ ! -x /usr/lib/cni/ptp ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(LAB_PACKAGES); \
	fi; tests/lab/build.sh && cross/image.sh amd64 dev target/lab/lineside.oci.tar; fi

lab-up: lab-tools ## A Kubernetes with one edge node on this machine, and Lineside on it (LAB=FOLDER)
	tests/lab/demo.sh up $(LAB)

lab-demo: lab-tools ## The same, with a broker and a camera: verdicts from a pod, and what kubectl says of it
	tests/lab/demo.sh show $(LAB)

fleet: lab-up ## What many agents cost the API server, in the lab (AGENTS=1000)
	ulimit -n $$(ulimit -Hn); FLEET_KUBECONFIG=$$(realpath $(LAB))/admin.kubeconfig AGENTS=$(or $(AGENTS),1000) \
		tests/lab/lab.sh exec $(LAB) center $(CARGO) bench --profile dev -p lineside --bench fleet
	tests/lab/lab.sh exec $(LAB) center ps -C lineside -o rss,args

lab-down: ## End it
	tests/lab/lab.sh down $(LAB)

$(VENV)/.installed: tests/requirements.txt
	@python3 -m venv $(VENV) 2>/dev/null || \
		{ $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy python3 python3-venv && python3 -m venv $(VENV); }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
	@touch $@

check: compiler ## Format, lints with warnings denied, dependencies, generated files
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	@$(MAKE) --no-print-directory deny
	@$(MAKE) --no-print-directory generate
	@git diff --exit-code -- docs/schemas agent/mqtt/src/sparkplug_b.rs edge-manifests/base/crds.yaml || { echo 'generated files were stale; commit what `make generate` wrote'; exit 1; }

deny: ## Licences, bans and sources of dependencies; advisories where their database can be had
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install cargo-deny --locked --version 0.20.2
	$(CARGO) deny --all-features check bans licenses sources
	@if $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny --all-features check advisories; \
	else echo 'advisories were not checked: their database cannot be fetched from here'; fi

generate: ## Write the JSON Schemas and the CRDs that are made from the code, and the code that is made from sparkplug_b.proto
	LINESIDE_UPDATE_GENERATED=1 $(CARGO) test --quiet --workspace --lib -- the_committed the_generated_code

bench: ## Stage times of the data plane, and the spool (Criterion)
	$(CARGO) bench --workspace --bench stages
	LINESIDE_BENCH_MILLION=1 $(CARGO) bench --profile dev -p lineside --bench spool

experiments: compiler test-tools lab-tools ## The long forms of the experiments: kills, cuts, damage, mutations, swaps, a month of plant time
	LINESIDE_SPOOL_SEQUENCES=100000 LINESIDE_SPOOL_DAMAGE=1000 LINESIDE_DAYS=30 \
		$(CARGO) test --workspace --lib -- --nocapture spool:: publish::
	LINESIDE_EXPERIMENT_AGENT_KILLS=200 LINESIDE_EXPERIMENT_BROKER_KILLS=50 LINESIDE_EXPERIMENT_CYCLES=20 \
		$(CARGO) test --workspace --test suite -- --nocapture --test-threads 2 spool::
	LINESIDE_LAB=required $(CARGO) test --workspace --test suite -- --nocapture cluster::
	LINESIDE_EXPERIMENT_KILLS=100 LINESIDE_EXPERIMENT_INDEX_DAMAGE=100 LINESIDE_EXPERIMENT_MUTATIONS=200 LINESIDE_EXPERIMENT_SWAPS=200 \
		$(CARGO) test --workspace --test suite -- --nocapture --test-threads 2 vet:: store:: swaps::

figures: test-tools ## Whole-process figures of the release binary: size, memory, start, frames per second (MODELS=...)
	$(CARGO) build --release --workspace
	$(VENV)/bin/python tests/figures.py target/release/lineside $(MODELS)

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Remove what was built
	$(CARGO) clean
	rm -rf $(VENV) dist
