# Every target works on a bare machine with Python >= 3.10, Rust and make.
VENV_PYTHON := .venv/bin/python
# PyO3's build script and the extension's tests look for this interpreter.
export PYO3_PYTHON := $(CURDIR)/$(VENV_PYTHON)
# A suite that may run anywhere must not reach for a hub.
export HF_HUB_OFFLINE := 1

# Kernels, stand-in headers and the simulator's runtime are compiled in, too.
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates -type f)
PYTHON_FOLDERS := python tests bench demo scripts mtlflashattn.data

.DEFAULT_GOAL := help
.PHONY: help setup clang build demo train test test-rust test-python test-neon mutants counters gpu-proof lint check-macos check-macos-wheel format docs links bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: .venv/ready ## Create .venv with everything that development, tests and demo need

.venv/ready: scripts/setup pyproject.toml
	scripts/setup
	@touch $@

clang: ## Find or install the compiler that the simulator of Metal kernels needs
	scripts/setup-clang

build: .venv/built ## Build the extension module into .venv

.venv/built: .venv/ready pyproject.toml $(RUST_SOURCES) $(wildcard mtlflashattn.data/purelib/*)
	.venv/bin/maturin develop --release --uv --quiet
	@touch $@

demo: build ## Run a real sentence encoder and a 32,768-token attention
	$(VENV_PYTHON) demo/run.py

train: build ## Train a small transformer with stock attention and with ours, and draw both loss curves
	$(VENV_PYTHON) demo/train_characters.py

test: test-rust test-python ## Run all Rust and Python tests

# The simulator runs on Linux only. Python tests that need it skip themselves.
NOT_TESTED := mtlflashattn-python $(if $(filter-out Linux,$(shell uname)),mtlflashattn-simulator)

test-rust: setup clang
	cargo test --workspace $(addprefix --exclude ,$(NOT_TESTED)) --quiet
	cargo test --release --package mtlflashattn-cpu --test disassembly --quiet

test-python: build clang
	$(VENV_PYTHON) -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

test-neon: ## Run the Rust tests as aarch64 code (under qemu on other machines)
	scripts/test-neon

mutants: clang ## Plant bugs in the Metal kernels and report which layer of the simulator notices each
	cargo run --quiet --package mtlflashattn-simulator --example mutants

counters: clang ## Print what the Metal kernels ask of memory and matrix units, per shape (PEER=FILE: _kernel.py of 0.2.0)
	PEER="$(PEER)" cargo run --quiet --package mtlflashattn-simulator --example counters

gpu-proof: clang ## Run the Metal kernels on an NVIDIA GPU: numbers and speed (PEER=FILE: _kernel.py of 0.2.0)
	PEER="$(PEER)" scripts/gpu-proof

lint: build ## Check formatting, clippy, ruff, types, the stub and the workflows
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features mtlflashattn-simulator/nvidia --quiet -- -D warnings
	.venv/bin/ruff check $(PYTHON_FOLDERS)
	.venv/bin/ruff format --check $(PYTHON_FOLDERS)
	.venv/bin/mypy
	$(VENV_PYTHON) -m mypy.stubtest metal_flash_attn._native
	.venv/bin/zizmor --offline --quiet .github

check-macos: ## Check the Rust code for macOS with clippy, on any host
	scripts/check-macos

check-macos-wheel: setup ## Link a wheel for macOS on this host and look what it holds; skipped without zig
	scripts/check-macos-wheel

format: setup ## Format Rust and Python
	cargo fmt --all
	.venv/bin/ruff check --fix $(PYTHON_FOLDERS)
	.venv/bin/ruff format $(PYTHON_FOLDERS)

docs: setup ## Build the site of docs/ into target/site; a broken link fails
	.venv/bin/zensical build --strict

links: ## List the links to other sites that README.md and docs/ have
	@grep -ohE 'https?://[^] )>"`]+' README.md CHANGELOG.md docs/*.md | sort -u

bench: build ## Measure against torch's scaled_dot_product_attention, interleaved
	$(VENV_PYTHON) -m bench

clean: ## Remove everything that was built
	rm -rf target .venv
