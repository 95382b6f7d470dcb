# Two commands: `make demo` runs the whole flow on a generated shop, `make test` runs the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
FAISS ?= cpu
RUN := $(VENV)/bin/python
# two test files at a time, in the order tests/conftest.py gives them; each process has a Ray of its own
BESIDE ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
JOB = $(RUN) jobs/$(1).py --config configs/$(1)/$(2).yaml

.DEFAULT_GOAL := help
.PHONY: help demo serve shop report test test-unit test-ray lint types bench-embed bench-index bench-scale bench-train \
        bench-real bench-finetuned bench-gbdt bench-rerank bench-transfer bench-serve bench-load bench-pareto \
        exactness chaos realism results cluster-up cluster-down clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[$(FAISS),demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[$(FAISS),demo,dev,bench,train,llm,stores]'
	@touch $@

demo: $(VENV)/.demo  ## generate a shop, prepare, embed, index, evaluate, report, serve it and ask it
	$(call JOB,run_shop,demo)

serve: $(VENV)/.demo  ## the same, and leave the service running (end it with Ctrl-C)
	$(call JOB,run_shop,demo) stay=true

shop: $(VENV)/.demo  ## your own catalogue: make shop DATA=products.csv [REVIEWS=reviews.csv] [COLUMNS=mapping.yaml]
	@test -n "$(DATA)" || { echo "usage: make shop DATA=products.csv [REVIEWS=reviews.csv] [COLUMNS=mapping.yaml]"; exit 2; }
	$(RUN) jobs/run_shop.py --config $(or $(COLUMNS),configs/run_shop/own.yaml) flow.prepare.source.products=$(DATA) \
	  $(if $(REVIEWS),flow.prepare.source.reviews=$(REVIEWS))

test: test-unit test-ray  ## unit tests, then the Ray tier

test-unit: $(VENV)/.dev  ## tests without Ray, about a minute
	$(RUN) -m pytest -m "not ray" $(BESIDE)

test-ray: $(VENV)/.dev  ## tests that start a local Ray, Serve or a cluster
	$(RUN) -m pytest -m ray $(BESIDE)

lint: $(VENV)/.dev  ## ruff
	$(RUN) -m ruff check .

types: $(VENV)/.dev  ## mypy, strict on the package
	$(RUN) -m mypy

bench-embed: $(VENV)/.dev  ## embedding speed against sentence-transformers and the usual Ray pipeline
	$(RUN) benchmarks/embed.py --config configs/bench_embed/full.yaml

bench-index: $(VENV)/.dev  ## index types beside hnswlib on 100,000 real embeddings
	$(RUN) benchmarks/index.py --config configs/bench_index/full.yaml

bench-train: $(VENV)/.dev  ## training speed against sentence-transformers' trainer, two workers, Ray against torchrun
	$(RUN) benchmarks/train_speed.py --config configs/bench_train_speed/full.yaml

bench-scale: $(VENV)/.dev  ## time and memory of preparation at 10k, 100k and 700k reviews
	$(RUN) benchmarks/scale.py --config configs/bench_scale/full.yaml

bench-real: $(VENV)/.dev  ## ESCI and Icecat, human labels
	$(RUN) benchmarks/real_labels.py --config configs/bench_real_labels/esci.yaml
	$(RUN) benchmarks/real_labels.py --config configs/bench_real_labels/icecat.yaml

bench-finetuned: $(VENV)/.dev  ## does fine-tuning help on ESCI and Icecat? nested cross-validation
	$(RUN) benchmarks/finetuned_labels.py --config configs/bench_finetuned_labels/esci.yaml
	$(RUN) benchmarks/finetuned_labels.py --config configs/bench_finetuned_labels/icecat.yaml

bench-gbdt: $(VENV)/.dev  ## what a cross-encoder and LightGBM add to fused retrieval, demo shop and null shop
	$(RUN) benchmarks/gbdt.py --config configs/bench_gbdt/full.yaml

bench-rerank: $(VENV)/.dev  ## does reranking help on ESCI and Icecat? nested cross-validation
	$(RUN) benchmarks/rerank_labels.py --config configs/bench_rerank_labels/esci.yaml
	$(RUN) benchmarks/rerank_labels.py --config configs/bench_rerank_labels/icecat.yaml

.PHONY: bench-goodbooks
bench-goodbooks: $(VENV)/.dev  ## books for readers: recommenders, cross-encoders and their blend under three kinds of negatives
	$(RUN) benchmarks/goodbooks.py --config configs/bench_goodbooks/full.yaml

bench-transfer: $(VENV)/.dev  ## which levers keep their sign on real data; needs bench-finetuned and the ablation
	$(RUN) benchmarks/finetuned_labels.py --config configs/bench_finetuned_labels/goodbooks.yaml
	$(RUN) benchmarks/transfer.py --config configs/bench_transfer/full.yaml

bench-concerns: $(VENV)/.dev  ## BT-BERT on planted truth: modes, explicit model, low data, new concerns, explanations, speed
	$(RUN) benchmarks/bt_bert.py --config configs/bench_bt_bert/full.yaml

.PHONY: bench-clothing bench-adapter
bench-clothing: $(VENV)/.dev  ## photographs of garments that find their class: frozen network against the adapter on it
	$(RUN) benchmarks/clothing.py --config configs/bench_clothing/full.yaml

bench-adapter: $(VENV)/.dev  ## the adapter of pictures on planted attributes: the usual recipe, ours, what the gate catches
	$(RUN) benchmarks/attribute_adapter.py --config configs/bench_attribute_adapter/full.yaml

bench-serve: $(VENV)/.dev  ## searches with reranking beside the usual stack: speed, quality, what a hop of Serve costs (after bench-rerank)
	$(call JOB,retrieve_candidates,icecat)
	$(call JOB,train_gbdt,bench_serve)
	$(RUN) benchmarks/serve_speed.py --config configs/bench_serve_speed/full.yaml

bench-load: $(VENV)/.dev  ## ten minutes at 80 % of the service's capacity, with malformed requests
	$(RUN) benchmarks/load.py --config configs/bench_load/full.yaml

bench-pareto: $(VENV)/.dev  ## quality against CPU for every cascade (after bench-rerank and bench-gbdt)
	$(RUN) benchmarks/pareto.py --config configs/bench_pareto/full.yaml
	$(call JOB,retrieve_candidates,bench_pareto)
	$(call JOB,train_gbdt,bench_pareto)
	$(call JOB,train_gbdt,bench_pareto) output=runs/bench_pareto/light-trees rerank='{one_title: false}' gbdt.without='[cross]'
	$(call JOB,train_gbdt,bench_pareto) output=runs/bench_pareto/plain-trees rerank='{one_title: false}' gbdt.without='[cross, product]'
	$(RUN) benchmarks/pareto.py --config configs/bench_pareto/planted.yaml

bench-hybrid: $(VENV)/.dev  ## text and pictures together against each alone, queries of words and of photographs
	$(RUN) benchmarks/hybrid.py --config configs/bench_hybrid/full.yaml

bench-images: $(VENV)/.dev  ## pictures on Ray against a plain PyTorch DataLoader loop
	$(RUN) benchmarks/images_speed.py --config configs/bench_images_speed/full.yaml

exactness: $(VENV)/.dev  ## the training step in every form against one plain full batch
	$(RUN) benchmarks/exactness.py --config configs/bench_exactness/full.yaml

chaos: $(VENV)/.dev  ## 20 kills during embedding and indexing; the result must equal an uninterrupted run
	$(RUN) benchmarks/chaos.py --config configs/chaos/full.yaml

realism: $(VENV)/.dev  ## the demo shop at full size beside real shops
	$(call JOB,make_demo_shop,realistic_full)
	$(call JOB,realism_card,full)

results: $(VENV)/.demo  ## rewrite the tables of README.md and docs/results.md from benchmarks/results
	$(RUN) benchmarks/tables.py

cluster-up: $(VENV)/.demo  ## start a local Ray cluster with token authentication
	$(RUN) cluster/local.py up

cluster-down: $(VENV)/.demo  ## stop that cluster, and no other Ray
	$(RUN) cluster/local.py down

clean:  ## delete the runs (not the virtual environment)
	rm -rf runs
