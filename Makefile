# make setup   a virtual environment in .venv with the pinned requirements
# make demo    the whole method on the built-in tiny model, in minutes on a CPU
# make study   the paper's claims on the built-in tiny models, on three seeds, in about an hour; stopped, it goes on
# make test    the tests
# make bench   sampling and training on a CPU, beside transformers; GSR_REAL_MODEL is the folder of
#              SmolLM2-135M-Instruct, and GSR_PROBLEMS has gsm8k.jsonl and svamp.jsonl
# make bench-gpu   both on one GPU, minutes, with nothing but this folder; RIVALS=--transformers adds it there
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/tiny
# Threads that wait for each other sleep instead of spinning: beside other work that is two to five times as fast.
export OMP_WAIT_POLICY ?= PASSIVE

setup: .venv/installed
.PHONY: setup demo study test bench bench-gpu

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Each command keeps what it has: stopped and run again, the demo goes on where it was. The weight: solving is half
# learned already, and with as much weight as refinement it improves until there is little left to refine.
demo: .venv/installed
	$(PY) sample.py --out $(RUN)/before.candidates.jsonl
	$(PY) refine.py --candidates $(RUN)/before.candidates.jsonl
	$(PY) train.py --epochs 2 --weight 4
	$(PY) sample.py --model $(RUN)/trained --out $(RUN)/after.candidates.jsonl
	$(PY) refine.py --model $(RUN)/trained --candidates $(RUN)/after.candidates.jsonl
	$(PY) evaluate.py $(RUN)/before.refined.jsonl $(RUN)/after.refined.jsonl --out $(RUN)

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
