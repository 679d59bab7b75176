# The commands for development. `make help` lists them.

# Targets that run the program or its tests build the whole workspace: with `-p`, cargo may select other features of shared
# dependencies, and compiles tract (several minutes) once more.
CARGO ?= cargo
RESULTS ?= 100
# Most of the time, most tests wait for another process, so there are more of them than processors.
export RUST_TEST_THREADS ?= 4
APT_PACKAGES := mosquitto mosquitto-clients libjpeg-turbo-progs ffmpeg prometheus python3-venv docker-registry openssl
LAB_PACKAGES := containerd runc containernetworking-plugins nftables conntrack iproute2 openssl curl ca-certificates faketime dnsmasq-base
LAB ?= target/lab/demo
TOOLS := mosquitto_sub cjpeg ffmpeg promtool docker-registry openssl
VENV := .venv
# Of `make fuzz`. The targets of FUZZ_FULL contain the inference engine, which takes many minutes to compile with sanitizers.
SECONDS ?= 60
FUZZ_LIGHT := command jpeg manifest mqtt_packet name object picture_stream rule sparkplug spool url
FUZZ_FULL := address cached_objects config last_good model picture signature store_record watch_message
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help compiler demo build image dist test test-tools lab-tools lab-up lab-down lab-demo fleet check deny generate bench experiments fuzz figures fmt clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The toolchain of rustup links with the C compiler of the system.
compiler:
	@command -v cc >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy gcc libc6-dev; }

demo: compiler ## Build, and run the main function on this machine (RESULTS=0: until Ctrl-C)
	@[ -e target/debug/lineside ] || echo 'compiling the agent, the inference engine and their dependencies; this takes about 8 minutes on two cores, once'
	$(CARGO) build --workspace
	target/debug/lineside demo --results $(RESULTS)

build: compiler ## Build the release binary: target/release/lineside
	$(CARGO) build --release --workspace

image: compiler ## Build the container image for K3s: dist/lineside-VERSION-amd64.oci.tar (and arm64 if its compiler is installed)
	cross/image.sh amd64 release
	@if command -v aarch64-linux-gnu-gcc /usr/bin/cargo >/dev/null; then cross/image.sh arm64 release; \
	else echo 'the image for arm64 was not built; it requires: apt-get install rustc-web cargo-web rust-web-src gcc-aarch64-linux-gnu libc6-dev-arm64-cross'; fi

dist: ## Write dist/lineside-install.yaml (one file for K3s) and dist/lineside-VERSION.tgz (Helm chart); requires kubectl
	python3 cross/dist.py

test: compiler test-tools lab-tools ## Install the tools of the tests, and run all tests
	$(CARGO) test --workspace

test-tools: $(VENV)/.installed ## Install missing tools: mosquitto, cjpeg, ffmpeg, promtool, docker-registry, openssl (Debian), and Python packages
	@for tool in $(TOOLS); do command -v $$tool >/dev/null || missing=1; done; \
	command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || missing=1; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -qy --no-install-recommends $(APT_PACKAGES); \
	fi

# The lab requires root and network namespaces. Without them, the cluster tests report that they are skipped.
lab-tools: compiler ## Install the tools of the lab; build its Kubernetes (once, takes minutes) and the image that its tests run
	@if [ "$$(id -u)" != 0 ]; then echo 'the lab is not built: it requires root'; else \
	for tool in containerd runc nft conntrack ip openssl curl faketime dnsmasq; do command -v $$tool >/dev/null || missing=1; done; \
	if [ -n "$$missing" ] || [ ! -x /usr/lib/cni/ptp ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(LAB_PACKAGES); \
	fi; tests/lab/build.sh && cross/image.sh amd64 dev target/lab/lineside.oci.tar; fi

lab-up: lab-tools ## Start a Kubernetes with one edge node on this machine, and install Lineside (LAB=FOLDER)
	tests/lab/demo.sh up $(LAB)

lab-demo: lab-tools ## The same with a broker and a camera; prints verdicts of a pod and the output of kubectl
	tests/lab/demo.sh show $(LAB)

fleet: lab-up ## Measure the load of many agents on the API server of the lab (AGENTS=1000)
	ulimit -n $$(ulimit -Hn); FLEET_KUBECONFIG=$$(realpath $(LAB))/admin.kubeconfig AGENTS=$(or $(AGENTS),1000) \
		tests/lab/lab.sh exec $(LAB) center $(CARGO) bench --profile dev -p lineside --bench fleet
	tests/lab/lab.sh exec $(LAB) center ps -C lineside -o rss,args

lab-down: ## Stop the lab
	tests/lab/lab.sh down $(LAB)

$(VENV)/.installed: tests/requirements.txt
	@python3 -m venv $(VENV) 2>/dev/null || \
		{ $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy python3 python3-venv && python3 -m venv $(VENV); }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
	@touch $@

check: compiler ## Check format, lints (warnings denied), dependencies and generated files
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	@$(MAKE) --no-print-directory deny
	@$(MAKE) --no-print-directory generate
	@git diff --exit-code -- ARCHITECTURE.md docs/schemas agent/mqtt/src/sparkplug_b.rs edge-manifests/base/crds.yaml || { echo 'generated files were stale; commit the output of `make generate`'; exit 1; }

deny: ## Check licences, bans and sources of dependencies, and advisories if their database is reachable
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install cargo-deny --locked --version 0.20.2
	$(CARGO) deny --all-features check bans licenses sources
	@if $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny --all-features check advisories; \
	else echo 'advisories were not checked: their database cannot be fetched'; fi

# The tests that compare generated files with the code write the files if this variable is set. Their names contain one of the
# two words.
generate: ## Generate the JSON Schemas, CRDs and code map from the code, and agent/mqtt/src/sparkplug_b.rs from sparkplug_b.proto
	LINESIDE_UPDATE_GENERATED=1 $(CARGO) test --quiet --workspace --lib -- committed generated
	LINESIDE_UPDATE_GENERATED=1 $(CARGO) test --quiet --workspace --test suite -- committed generated

bench: ## Measure the stages of the data plane and the spool (Criterion)
	$(CARGO) bench --workspace --bench stages
	LINESIDE_BENCH_MILLION=1 $(CARGO) bench --profile dev -p lineside-spool --bench spool

experiments: compiler test-tools lab-tools ## Run the experiments with many iterations: kills, cuts, damage, mutations, swaps, a simulated month
	LINESIDE_SPOOL_SEQUENCES=100000 LINESIDE_SPOOL_DAMAGE=1000 LINESIDE_DAYS=30 \
		$(CARGO) test -p lineside-spool -p lineside-mqtt --lib -- --nocapture
	LINESIDE_EXPERIMENT_AGENT_KILLS=200 LINESIDE_EXPERIMENT_BROKER_KILLS=50 LINESIDE_EXPERIMENT_CYCLES=20 \
		$(CARGO) test --workspace --test suite -- --nocapture --test-threads 2 spool::
	LINESIDE_LAB=required $(CARGO) test --workspace --test suite -- --nocapture cluster::
	LINESIDE_EXPERIMENT_KILLS=100 LINESIDE_EXPERIMENT_INDEX_DAMAGE=100 LINESIDE_EXPERIMENT_MUTATIONS=200 LINESIDE_EXPERIMENT_SWAPS=200 \
		$(CARGO) test --workspace --test suite -- --nocapture --test-threads 2 admission:: store:: swaps::
	LINESIDE_OUTAGE_RESULTS=12600 $(CARGO) test --workspace --test suite -- --nocapture endurance::memory

# libFuzzer chooses inputs by the code that they reach. `cargo test -p lineside-fuzz` runs the same targets on stable Rust.
fuzz: compiler ## Fuzz with libFuzzer on nightly Rust (TARGET=picture_stream, default: all without the engine; SECONDS=60 each)
	@cargo fuzz --version >/dev/null 2>&1 || cargo +stable install cargo-fuzz --locked
	@rustup toolchain list | grep -q '^nightly' || rustup toolchain install nightly --profile minimal
	@mkdir -p target/fuzz-failures && cp Cargo.lock tests/fuzz/libfuzzer/
	@set -e; for target in $(or $(TARGET),$(FUZZ_LIGHT)); do \
		echo "fuzzing $$target for $(SECONDS) s"; \
		case " $(FUZZ_FULL) " in *" $$target "*) features='--features full';; *) features=;; esac; \
		corpus=$$PWD/target/fuzz-corpus/$$target; mkdir -p "$$corpus"; \
		LINESIDE_FUZZ_TARGET=$$target LINESIDE_FUZZ_CORPUS=$$corpus cargo +nightly fuzz run --fuzz-dir tests/fuzz/libfuzzer \
			--target-dir target/libfuzzer $$features any "$$corpus" -- -max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=2048 \
			-max_len=65536 -artifact_prefix=$$PWD/target/fuzz-failures/$$target- -verbosity=0 -print_final_stats=1; \
	done

figures: test-tools ## Measure the release binary: size, memory, time to the first result, frames per second (MODELS=...)
	$(CARGO) build --release --workspace
	$(VENV)/bin/python tests/figures.py target/release/lineside $(MODELS)

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Delete all build outputs
	$(CARGO) clean
	rm -rf $(VENV) dist
