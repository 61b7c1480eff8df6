# The environment lives in .venv; a stamp in it marks each finished step, so an interrupted call goes on at the next.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
PHONE := .venv-phone
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup fetch lab compare test phone browser compiler docs notebooks reference removing distilling adapting partitioning hybrid lint format bench engines peers lock clean

help:
	@echo "make compare    compare a first set of recipes on this machine, write results/report.html"
	@echo "make test       pass every test: units, notebooks, browser"
	@echo "make lab        open JupyterLab on notebook 00"
	@echo "make setup      create the environment only"
	@echo "make notebooks  run every notebook from a clean kernel and keep its outputs"
	@echo "make docs       write what docs/ says of recipes, fields and engines, from the registries"
	@echo "make lint       format, lint, import and notebook checks;  make format mends what it can"
	@echo "make reference  measure the rows of data/reference anew, and the picture of the README"
	@echo "make removing   of these, the rows of pruning and low rank alone"
	@echo "make distilling the rows of students, make adapting those of adapters, make partitioning those of fleets"
	@echo "make bench      measure the measuring: against a plain loop and against lm-eval"
	@echo "make engines    the same integers on every engine: shares of the bandwidth limit, and the engines' own timings"
	@echo "make phone      an environment for ExecuTorch and LiteRT too, in .venv-phone"
	@echo "make peers      quantize with llm-compressor, auto-round, hqq and torchao too, in an environment of theirs"
	@echo "make lock       resolve the dependencies anew into requirements.lock"
	@echo "make clean      remove the environment and build leftovers; weights, rows and results stay"

setup: $(VENV)/installed.stamp

$(VENV)/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "edgelab needs Python 3.11 or later, and $(PYTHON) is not; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Plain pip brings torch with CUDA, several GB, to a Linux machine; uv knows where the CPU build is. Where that place
# cannot be reached, uv gives up within seconds and pip looks in its own. $(call install_torch,python,requirement)
define install_torch
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "Installing the CPU build of $(2)"; \
		$(1) -m pip install --quiet --disable-pip-version-check uv; \
		UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_RETRIES=1 \
			$(1) -m uv pip install --quiet --python $(1) --torch-backend=cpu '$(2)' 2>/dev/null \
			|| echo "No separate CPU build can be reached from here; pip decides."; fi
	$(1) -m pip install --quiet --disable-pip-version-check '$(2)'
endef

$(VENV)/torch.stamp: $(VENV)/created.stamp requirements.lock
	$(call install_torch,$(BIN)/python,$(TORCH))
	@touch $@

$(VENV)/locked.stamp: $(VENV)/torch.stamp
	$(PIP) --requirement requirements.lock
	@touch $@

$(VENV)/installed.stamp: $(VENV)/locked.stamp pyproject.toml notebooks/jupyterlab_overrides.json
	$(PIP) --quiet --no-deps --editable .
	@touch $@

$(VENV)/bench.stamp: $(VENV)/installed.stamp
	$(PIP) --quiet --constraint requirements.lock --editable '.[bench]'
	@touch $@

# The engines of phones, 1.1 GB, in an environment that sees the first: torchao, which both of them bring, would be
# imported by every process of edgelab in the first.
$(PHONE)/installed.stamp: $(VENV)/installed.stamp requirements-phone.lock
	$(BIN)/python -m venv --clear $(PHONE)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(PHONE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(PHONE)/bin/python -m pip install --disable-pip-version-check --no-deps --requirement requirements-phone.lock
	$(PHONE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

phone: $(PHONE)/installed.stamp fetch

fetch: setup
	$(BIN)/edgelab fetch

lab: fetch
	$(BIN)/edgelab lab

compare: fetch
	$(BIN)/edgelab compare --report results/report.html

# Debian's Chromium drives the widget tests; without it they fail and say so, the others run.
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null \
			|| echo "chromium could not be installed with apt-get; the browser tests will fail."; \
	else echo "No Chromium here and no right to install it; the browser tests will fail until chromium is installed."; fi

# The compiled runtime writes C++; its test needs g++.
compiler:
	@if command -v g++ clang++ >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ >/dev/null \
			|| echo "g++ could not be installed with apt-get; the test of the compiled runtime will fail."; \
	else echo "No C++ compiler here and no right to install it; the test of the compiled runtime will fail."; fi

# Units in two processes of one thread each, most of which wait for Python; a file stays in one process, because its tests
# share what they trained. Notebooks time things and have the machine to themselves. Each phone engine in a process of its
# own, as in a measurement: after LiteRT's converter, ExecuTorch's fails at times.
test: phone browser compiler
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest notebooks
	$(PHONE)/bin/python -m pytest tests/test_executorch.py tests/test_phone_layouts.py tests/test_sessions.py tests/test_uneven.py -k executorch
	$(PHONE)/bin/python -m pytest tests/test_litert.py tests/test_phone_layouts.py tests/test_exporting.py tests/test_sessions.py tests/test_uneven.py -k "litert or bundle"

docs: setup
	$(BIN)/python docs/build.py

notebooks: fetch
	$(BIN)/python notebooks/build.py run $(NAMES)
	$(BIN)/python notebooks/build.py check

# The project's own rows, measured anew in a home of their own on the reference machine, and the picture of the README.
# Twelve hours on two quiet cores: training, tasks, engines, removing, distilling, adapting and hybrid take more than an
# hour each. An interrupted call goes on at the next; remove the folders in results first to begin anew.
# Techniques are compared with the embedding in 8 bits: under a float one, half of the bytes are not theirs. That stage
# costs nothing once the layers are made, so there are rows with and without it.
SMALL := + quantize.embedding
MEASURED := none quantize.bf16 quantize.rtn:bits=8,group_size=0 quantize.rtn:bits=4 quantize.dynamic \
	"quantize.rtn:bits=8,group_size=0 $(SMALL)" "quantize.rtn:bits=4 $(SMALL)" "quantize.rtn:bits=3 $(SMALL)" \
	"quantize.rtn:bits=4,group_size=32 $(SMALL)"
# Their kernels are those of the rows above, or none: only their quality is new.
LAYERS := quantize.hqq:bits=4 quantize.hqq:bits=3 quantize.gptq:bits=4 quantize.gptq:bits=3 \
	quantize.gptq:bits=4,range=mse quantize.gptq:bits=3,range=mse quantize.awq:bits=4 quantize.awq:bits=3 \
	quantize.autoround:bits=4 quantize.autoround:bits=3 quantize.mixed:bits=4 quantize.mixed:bits=3 \
	qat:bits=4,minutes=4.6 qat:bits=3,minutes=4.6 qat:bits=3,minutes=10 qat:bits=2,minutes=10 \
	qat:bits=1.58,minutes=10,learning_rate=0.001
# As many tokens as 4.6 minutes train at 415 tokens/s.
TRAINED := qat:bits=4,steps=112 qat:bits=3,steps=112
UNDER_AWQ := quantize.awq:bits=3,scales_only=true
SCORED := $(foreach recipe,$(LAYERS),"$(recipe) $(SMALL)") \
	"$(UNDER_AWQ) + quantize.gptq:bits=3 $(SMALL)" "$(UNDER_AWQ) + quantize.autoround:bits=3 $(SMALL)" \
	quantize.static quantize.static:range=percentile quantize.static:range=mse quantize.smooth \
	quantize.kv:bits=8 quantize.kv:bits=4
BARE := $(LAYERS) quantize.rtn:bits=3 quantize.rtn:bits=4,group_size=32 quantize.rtn:bits=4,range=mse \
	"$(UNDER_AWQ) + quantize.gptq:bits=3" "$(UNDER_AWQ) + quantize.autoround:bits=3"
COMPILED := none "none @ compiled" "quantize.rtn:bits=4 $(SMALL)" "quantize.rtn:bits=4 $(SMALL) @ compiled"
# The same integers on every engine, floats and 8 bits beside them, and the engines' own quantizers.
INT4 := quantize.gptq:bits=4,range=mse $(SMALL)
INT8 := quantize.rtn:bits=8,group_size=0,symmetric=true $(SMALL)
ENGINES := "$(INT4)" "$(INT4) @ onnxruntime" "$(INT4) @ openvino" "$(INT4) @ llamacpp" \
	"$(INT8)" "$(INT8) @ onnxruntime" "$(INT8) @ openvino" "$(INT8) @ llamacpp" \
	"none @ onnxruntime" "none @ llamacpp" quantize.fp16 "quantize.fp16 @ openvino" \
	"native.int4 @ onnxruntime" "native.int4 @ openvino" "native.int8 @ openvino"
ON_PHONES := "none @ litert" "native.int8 @ litert" "native.int4 @ litert" \
	"none @ executorch" "native.int8 @ executorch" "native.int4 @ executorch"
INT4_EVERYWHERE := "$(INT4)" "$(INT4) @ onnxruntime" "$(INT4) @ openvino" "$(INT4) @ llamacpp" \
	"native.int4 @ litert" "native.int4 @ executorch"
# Removing, with the embedding in float: its quality first, then bytes and milliseconds, then what training gives back.
ZEROS := prune.magnitude prune.magnitude:per=row prune.magnitude:per=global \
	$(foreach method,wanda sparsegpt,prune.$(method) prune.$(method):by_layer=owl prune.$(method):by_layer=measured \
		prune.$(method):pattern=4:8 prune.$(method):pattern=2:4) \
	$(foreach sparsity,0.3 0.6 0.7,$(foreach method,magnitude wanda sparsegpt,prune.$(method):sparsity=$(sparsity)))
SHAPES := prune.heads:groups=2 prune.heads:queries=2 prune.channels prune.layers:keep=25 prune.layers:keep=20 \
	prune.hidden prune.vocab:keep=16384 lowrank.svd:share=0.8 lowrank.svd:share=0.8,by_layer=allocated
CONTROLS := prune.channels:by=activation prune.channels:by=magnitude lowrank.svd:share=0.8,whitened=false \
	$(foreach by,influence angular even random,prune.layers:keep=25,by=$(by)) prune.layers:keep=20,by=influence
STORED := "prune.wanda + prune.store" "prune.wanda + prune.store:format=csr" \
	"prune.wanda:sparsity=0.9 + prune.store:format=csr" "prune.wanda:pattern=2:4 + prune.store:format=two_four"
SHORTEST := prune.layers:keep=20 + recover:steps=243
# What the bytes of a half-empty 4-bit model buy otherwise.
SAME_BYTES := "prune.sparsegpt:by_layer=measured,bits=4 + prune.store $(SMALL)" \
	"prune.wanda:by_layer=measured + quantize.rtn:bits=4 + prune.store $(SMALL)" \
	"prune.layers:keep=20 + quantize.gptq:bits=4,range=mse $(SMALL)" \
	"$(SHORTEST) + quantize.gptq:bits=4,range=mse $(SMALL)" \
	"prune.vocab:keep=8192 + quantize.gptq:bits=4,range=mse $(SMALL)"
# As many tokens for each as 5 minutes train at 415 tokens/s, and as 10 for the shortest.
RECOVERED := $(foreach recipe,prune.wanda:by_layer=measured prune.heads:groups=2 prune.channels prune.layers:keep=25 \
	prune.layers:keep=20 prune.hidden,"$(recipe) + recover:steps=122") \
	"lowrank.svd:share=0.8,by_layer=allocated + recover:steps=122" "prune.layers:keep=25 + recover:steps=122,corpus=web"
ON_ENGINES := $(foreach engine,onnxruntime llamacpp,$(foreach recipe,none prune.layers:keep=20 prune.channels \
	prune.heads:groups=2,"$(recipe) @ $(engine)"))
reference: export EDGELAB_HOME := $(CURDIR)/results/reference
reference: phone removing distilling adapting partitioning hybrid
	$(BIN)/edgelab compare $(MEASURED)
	$(BIN)/edgelab compare $(SCORED) $(BARE) $(TRAINED) --only quality
	$(BIN)/edgelab compare $(COMPILED) --only speed
	$(BIN)/edgelab compare $(ENGINES)
	$(PHONE)/bin/edgelab compare $(ON_PHONES)
	$(BIN)/edgelab compare $(MEASURED) $(SCORED) $(ENGINES) --only tasks
	for threads in 1 2; do for prompt in 32 128 512; do \
		$(PHONE)/bin/edgelab compare $(INT4_EVERYWHERE) --only speed --threads $$threads --prompt-tokens $$prompt; \
	done; done
	$(BIN)/edgelab ledger export data/reference/rows.jsonl
	$(BIN)/edgelab report --reference data/reference/tradeoff.png

# The rows of pruning and low rank, in a home and a file of their own: two to three hours, half of them training.
removing: export EDGELAB_HOME := $(CURDIR)/results/removing
removing: fetch
	$(BIN)/edgelab compare none $(ZEROS) $(CONTROLS) $(SAME_BYTES) --only quality
	for seed in 1 2 3 4 5; do $(BIN)/edgelab compare none prune.channels:by=random --only quality --seed $$seed; done
	$(BIN)/edgelab compare none $(SHAPES) $(STORED) $(ON_ENGINES)
	$(BIN)/edgelab compare none $(RECOVERED) "$(SHORTEST)" --only quality
	$(BIN)/edgelab compare none prune.wanda $(SHAPES) $(RECOVERED) "$(SHORTEST)" $(SAME_BYTES) --only tasks
	$(BIN)/edgelab ledger export data/reference/removing.jsonl

# Half a model as a student: which lesson, at the same steps; with a teacher and without at the same seconds, at two
# rates and with three seeds, the last of them from the blocks that the first one chose; and the best student in 4 bits
# on the fastest engine. Three hours, by the clock: nothing else may run.
HALF := prune.layers:keep=15
NAMED_HALF := prune.layers:drop=3/4/5/6/7/10/12/13/14/19/21/22/23/25/26
LOSSES := loss=kl loss=ce loss=kl,hidden=1 loss=kl,temperature=2 loss=kl,learning_rate=0.001 \
	loss=ce,learning_rate=0.001 loss=kl,hidden=1,learning_rate=0.001 loss=kl,learning_rate=0.001,fresh=true
LESSONS := $(foreach lesson,$(LOSSES),"$(HALF) + distill:$(lesson),steps=61")
TAUGHT := distill:loss=kl,minutes=10,learning_rate=0.001
UNTAUGHT := distill:loss=ce,minutes=10
TWO_THIRDS := prune.layers:drop=12/13/14/15/16/17/18/19/25/26 + $(TAUGHT)
OTHER_RATES := "$(HALF) + distill:loss=kl,minutes=10" "$(HALF) + $(UNTAUGHT),learning_rate=0.001"
distilling: export EDGELAB_HOME := $(CURDIR)/results/distilling
distilling: fetch
	$(BIN)/edgelab compare none $(HALF) $(LESSONS) $(OTHER_RATES) --only quality
	for seed in 0 1; do $(BIN)/edgelab compare none "$(HALF) + $(TAUGHT)" "$(HALF) + $(UNTAUGHT)" --only quality --seed $$seed; done
	$(BIN)/edgelab compare none "$(NAMED_HALF) + $(TAUGHT)" "$(NAMED_HALF) + $(UNTAUGHT)" --only quality --seed 2
	$(BIN)/edgelab compare none "$(HALF) + $(TAUGHT)" "$(HALF) + $(TAUGHT) + $(INT4) @ llamacpp" \
		"$(INT4) @ llamacpp" --seed 1
	$(BIN)/edgelab compare none "$(HALF) + $(TAUGHT)" --only tasks --seed 1
	$(BIN)/edgelab compare none "$(TWO_THIRDS)" "$(TWO_THIRDS) + $(INT4) @ llamacpp" --only quality,speed,memory
	$(BIN)/edgelab ledger export data/reference/distilling.jsonl

# Adapters for stories, code and orders: ranks, learning rates, all weights as the control, packed bases, merging. Each
# is judged on the text it was trained on, on wiki for what it has forgotten, or by the orders it reads. Two hours.
TOLD := corpus=stories,steps=60
WAYS := $(foreach rank,1 4 8 16 64,lora:rank=$(rank),$(TOLD)) lora:rank=8,$(TOLD),targets=q_proj/v_proj \
	lora:rank=8,$(TOLD),dora=true \
	$(foreach rate,0.001 0.01,lora:rank=8,$(TOLD),learning_rate=$(rate)) \
	$(foreach rate,0.00003 0.0001 0.0003,recover:loss=ce,$(TOLD),learning_rate=$(rate))
SPARE := quantize.rtn:bits=4,group_size=64
BASES := "$(SPARE) + qlora:$(TOLD)" "lora:$(TOLD) + merge" "lora:$(TOLD) + merge + $(SPARE)" $(SPARE) \
	"quantize.rtn:bits=2,group_size=64 + qlora:$(TOLD)" "quantize.loftq:bits=2,group_size=64 + qlora:$(TOLD),start=residual"
ORDERS := lora:corpus=extraction,length=128,steps=120 "$(SPARE) + qlora:corpus=extraction,length=128,steps=120"
adapting: export EDGELAB_HOME := $(CURDIR)/results/adapting
adapting: fetch
	$(BIN)/edgelab compare none $(WAYS) $(BASES) --only quality --corpus stories
	$(BIN)/edgelab compare none $(WAYS) $(BASES) --only quality
	for corpus in code wiki; do $(BIN)/edgelab compare none lora:corpus=code,steps=60 --only quality --corpus $$corpus; done
	$(BIN)/edgelab compare none $(ORDERS) --only extraction
	$(BIN)/edgelab compare none "lora:$(TOLD)" "lora:$(TOLD) @ llamacpp" "lora:$(TOLD) + merge" "$(SPARE) + qlora:$(TOLD)"
	$(BIN)/edgelab ledger export data/reference/adapting.jsonl

# Two stages on this machine, cut where they take the same time, in three wire formats; a packed model; a published
# fleet at its pace. Ten minutes. Ray comes with the environment.
SPLIT := none @ partition:fleet=two_here,cut=18
partitioning: export EDGELAB_HOME := $(CURDIR)/results/partitioning
partitioning: fetch
	$(BIN)/edgelab compare none "$(SPLIT)" "quantize.rtn:bits=4 @ partition:fleet=two_here,use=cloud" \
		"quantize.rtn:bits=4 @ partition:fleet=edgeshard" --only speed,memory
	$(BIN)/edgelab compare none "$(SPLIT)" "$(SPLIT),wire=float16" "$(SPLIT),wire=int8" --only quality
	$(BIN)/edgelab ledger export data/reference/partition.jsonl

# Edge and cloud on this machine, which answer in turns, and the link between them. The edge is half a model, taught in
# five minutes' tokens; 4 bits on llama.cpp are an edge that leaves little to route. An hour; nothing else may run.
STUDENT := prune.layers:drop=3/4/5/6/7/12/13/14/15/16/17/18/19/25/26 + distill:loss=kl,steps=122,learning_rate=0.001
BY_LTE := cloud=(none),link=lte
HYBRID := "$(STUDENT) @ cascade:$(BY_LTE),share=0" "$(STUDENT) @ cascade:$(BY_LTE),share=0,score=router" \
	"$(STUDENT) @ cascade:$(BY_LTE)" "$(STUDENT) @ cloud:$(BY_LTE)" "$(STUDENT) @ speculative:$(BY_LTE)" \
	"none @ split:link=lte,cut=5" "$(INT4) @ cascade:$(BY_LTE),edge=llamacpp,share=0"
PRIVATE := $(foreach policy,edge local redact cloud,"$(STUDENT) @ redact:$(BY_LTE),policy=$(policy)") \
	"$(INT4) @ redact:$(BY_LTE),edge=llamacpp,policy=edge"
hybrid: export EDGELAB_HOME := $(CURDIR)/results/hybrid
hybrid: fetch
	$(BIN)/edgelab compare none "$(STUDENT)" --only quality
	$(BIN)/edgelab compare none $(HYBRID) --only requests
	$(BIN)/edgelab compare none $(PRIVATE) --only privacy
	$(BIN)/edgelab ledger export data/reference/hybrid.jsonl
	$(BIN)/python -m benchmarks.hybrid exposure --write

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/python notebooks/build.py check
	$(BIN)/python docs/build.py --check

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/bench.stamp fetch
	$(BIN)/python -m benchmarks

engines: phone
	$(PHONE)/bin/python -m benchmarks.engines

# Without dependencies: peers.lock holds them all, and benchmarks/peers.txt says why pip would not agree with it.
$(PEERS)/installed.stamp: benchmarks/peers.lock
	$(PYTHON) -m venv $(PEERS)
	$(call install_torch,$(PEERS)/bin/python,$(shell sed -n '/^torch==/p' benchmarks/peers.lock))
	DISABLE_CUDA=1 $(PEERS)/bin/python -m pip install --disable-pip-version-check --no-deps \
		--requirement benchmarks/peers.lock
	@touch $@

peers: $(PEERS)/installed.stamp fetch
	$(BIN)/python -m benchmarks.peers

# Resolved together with `bench`, so that adding it later changes no version that was tested; frozen without it.
lock: PIN := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",/\1/p' pyproject.toml)
lock:
	$(PYTHON) -m venv --clear .venv-lock/all
	$(call install_torch,.venv-lock/all/bin/python,$(PIN))
	.venv-lock/all/bin/pip install --quiet --editable '.[test,runtimes,cluster,hybrid,bench]'
	.venv-lock/all/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > .venv-lock/all.txt
	$(PYTHON) -m venv --clear .venv-lock/tested
	$(call install_torch,.venv-lock/tested/bin/python,$(PIN))
	.venv-lock/tested/bin/pip install --quiet --constraint .venv-lock/all.txt --editable '.[test,runtimes,cluster,hybrid]'
	.venv-lock/tested/bin/pip freeze --exclude-editable --exclude uv | sed 's/+cpu$$//' > .venv-lock/tested.txt
	mv .venv-lock/tested.txt requirements.lock
	$(PYTHON) -m venv --clear .venv-lock/phone
	$(call install_torch,.venv-lock/phone/bin/python,$(PIN))
	.venv-lock/phone/bin/pip install --quiet --constraint requirements.lock --editable '.[test,runtimes,cluster,hybrid,executorch,litert]'
	.venv-lock/phone/bin/pip freeze --exclude-editable --exclude uv | sed 's/+cpu$$//' \
		| grep --invert-match --line-regexp --fixed-strings --file requirements.lock > .venv-lock/phone.txt
	mv .venv-lock/phone.txt requirements-phone.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(PEERS) $(PHONE) .venv-lock build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
