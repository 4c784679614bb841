# make setup   a virtual environment in .venv with the pinned requirements
# make demo    the whole method on the built-in tiny model, in minutes on a CPU
# make questions   what reviewers ask, on the demo's trained model, in minutes on a CPU
# make real    the same on a real model, on a GPU if there is one: see the variables below
# make study   the paper's claims on the built-in tiny models, on three seeds, in about 90 minutes; stopped, it goes on
# make test    the tests
# make bench   sampling and training on a CPU, beside transformers; GSR_REAL_MODEL is the folder of
#              SmolLM2-135M-Instruct, and GSR_PROBLEMS has gsm8k.jsonl and svamp.jsonl
# make bench-gpu   both on one GPU, minutes, with nothing but this folder; RIVALS=--transformers adds it there
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/tiny

# make real: a student, its teacher (or the student's own name: it learns from its own right refinements), problems
# to train on and to test on, each a name or a file; candidates, and the teacher's refinements, a problem.
MODEL ?= qwen-0.5b
TEACHER ?= qwen-7b
TRAIN ?= gsm8k-train
TEST ?= gsm8k
N ?= 4
K ?= 1
# The first so many problems: LIMIT=500, or LIMIT="1000 300" for 1,000 to train on and 300 to test on; empty: all.
LIMIT ?=
# Tokens of a completion at most (empty: what the model says), more flags for train.py, processes, one on each GPU.
TOKENS ?=
TRAINING ?=
GPUS ?= 1
# Everything is written here; with other settings, choose another.
OUT ?= runs/real/$(notdir $(MODEL))
RUN_ON = $(if $(filter-out 1,$(GPUS)),.venv/bin/torchrun --nproc-per-node=$(GPUS),$(PY))
TOKENS_FLAG = $(if $(TOKENS),--max-new-tokens $(TOKENS))
TEST_FLAGS = --data $(TEST) $(if $(LIMIT),--limit $(lastword $(LIMIT))) -n $(N) $(TOKENS_FLAG)
TRAIN_FLAGS = --model $(MODEL) --teacher $(TEACHER) --data $(TRAIN) $(if $(LIMIT),--limit $(firstword $(LIMIT))) \
	-n $(N) -k $(K) $(TOKENS_FLAG) $(TRAINING) --out $(OUT)/trained
# Threads that wait for each other sleep instead of spinning: beside other work that is two to five times as fast.
export OMP_WAIT_POLICY ?= PASSIVE

setup: .venv/installed
.PHONY: setup demo questions real study test bench bench-gpu

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Each command keeps what it has: stopped and run again, the demo goes on where it was.
demo: .venv/installed
	$(PY) sample.py --out $(RUN)/before.candidates.jsonl
	$(PY) refine.py --candidates $(RUN)/before.candidates.jsonl
	$(PY) train.py --limit 1000 --steps 60
	$(PY) sample.py --model $(RUN)/trained --out $(RUN)/after.candidates.jsonl
	$(PY) refine.py --model $(RUN)/trained --candidates $(RUN)/after.candidates.jsonl
	$(PY) evaluate.py $(RUN)/before.refined.jsonl $(RUN)/after.refined.jsonl --out $(RUN)

# Of the demo's student: 16 candidates and refinements that see 1 to 16 of them, three rounds, waves, and a router.
QUESTIONS := $(RUN)/questions
questions: .venv/installed
	$(PY) sample.py --model $(RUN)/trained -n 16 $(if $(LIMIT),--limit $(LIMIT)) --out $(QUESTIONS)/all.candidates.jsonl
	$(PY) sample.py --model $(RUN)/trained -n 16 $(if $(LIMIT),--limit $(LIMIT)) --adaptive --out $(QUESTIONS)/waves.candidates.jsonl
	for k in 1 2 4 8 16; do $(PY) refine.py --model $(RUN)/trained --candidates $(QUESTIONS)/all.candidates.jsonl \
		-k 2 --shown $$k --out $(QUESTIONS)/shown$$k.refined.jsonl || exit; done
	$(PY) refine.py --model $(RUN)/trained --candidates $(QUESTIONS)/all.candidates.jsonl \
		-k 4 --shown 4 --rounds 3 --out $(QUESTIONS)/rounds.refined.jsonl
	$(PY) evaluate.py $(foreach k,1 2 4 8 16,$(QUESTIONS)/shown$(k).refined.jsonl) $(QUESTIONS)/rounds.refined.jsonl \
		$(QUESTIONS)/rounds.round3.refined.jsonl $(QUESTIONS)/waves.candidates.jsonl --out $(QUESTIONS)
	$(PY) route.py $(RUN)/after.refined.jsonl --out $(QUESTIONS)

real: .venv/installed
	$(RUN_ON) train.py $(TRAIN_FLAGS) --dry-run
	$(RUN_ON) sample.py --model $(MODEL) $(TEST_FLAGS) --out $(OUT)/before.candidates.jsonl
	$(RUN_ON) refine.py --model $(MODEL) --candidates $(OUT)/before.candidates.jsonl $(TOKENS_FLAG)
	$(RUN_ON) train.py $(TRAIN_FLAGS)
	$(RUN_ON) sample.py --model $(OUT)/trained $(TEST_FLAGS) --out $(OUT)/after.candidates.jsonl
	$(RUN_ON) refine.py --model $(OUT)/trained --candidates $(OUT)/after.candidates.jsonl $(TOKENS_FLAG)
	$(PY) evaluate.py $(OUT)/before.refined.jsonl $(OUT)/after.refined.jsonl --out $(OUT)

study: .venv/installed
	$(PY) tiny/study.py

test: .venv/installed-test
	.venv/bin/ruff check .
	$(PY) -m pytest -q

bench: .venv/installed-test
	$(PY) bench/sampling.py --device cpu
	$(PY) bench/training.py --device cpu

bench-gpu: .venv/installed
	@$(PY) bench/sampling.py --device cuda --only speed --out runs/bench/gpu-sampling $(RIVALS)
	@$(PY) bench/training.py --device cuda --out runs/bench/gpu-training $(RIVALS)
