#!/usr/bin/env bash
# Tests and measures the package on one data-centre GPU in less than eight minutes:
#
#     examples/benchmarks/gpu.sh --data FOLDER --out FOLDER [--device cuda|cpu] [--smoke]
#
# The first folder has cifar10.npz in Keras layout. What is found stands in the second: step_overhead.jsonl and
# training.jsonl, with their tables in STEP_OVERHEAD.md and TRAINING.md; stages.jsonl, with the seconds and the exit
# code of each stage; and gpu.log, with all that was printed. A stage that fails or runs out of time leaves the others,
# and its own finished lines, as they are. The exit code is 1 then, and a second call with the same folder measures what
# is missing. Needed are the repository, torch with CUDA and Triton, what the package itself needs, and pytest. PYTHON
# names the interpreter if it is not python3.
#
# With --smoke everything is so small that it takes less than two minutes of one core. It shows that the script works,
# and nothing else: what it measures means nothing. On a CPU there is only this.
#
# The limits, in seconds, come from estimates for an H200; none of it has run on a GPU yet:
#
#   stage              estimate  limit
#   tests                    80     95  Triton against eager operations, training and waiting; all kernels compile anew
#   steps                   130    145  SGD-M and AdamW, rule "unit", on six networks: 12 cases of 5 to 9 s; 40 s for
#                                       imports, kernels and the pause of ResNet-18
#   training                195    205  24 runs of 15 epochs of a ResNet-18 of half its width, batch 512: 1,320 steps of
#                                       5 to 6 ms each; with all its width 400 s
#   table of steps            6     12
#   table of training         6     12
#
# The rule "path" is left out for time: step_overhead.py with --rules path and the same --out adds it.
set -uo pipefail

usage() {
  echo "usage: $0 --data FOLDER --out FOLDER [--device cuda|cpu] [--smoke]" >&2
  exit 2
}

data='' out='' device=cuda smoke=''
while (($#)); do
  case $1 in
    --data | --out | --device)
      (($# > 1)) || usage
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --smoke) smoke=1 && shift ;;
    *) usage ;;
  esac
done
[[ -n $data && -n $out && $device =~ ^(cuda|cpu)$ ]] || usage
if [[ $device == cpu && -z $smoke ]]; then
  echo "On a CPU this takes hours: give --smoke, too, which shows that the script works." >&2
  exit 2
fi
data=$(realpath -e -- "$data") || exit 2
mkdir -p -- "$out" && out=$(realpath -- "$out") || exit 2
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
benchmarks=examples/benchmarks

if [[ $device == cuda ]]; then
  "$python" -c 'import torch, triton; torch.zeros(1, device="cuda")' || {
    echo "There is no GPU with Triton for torch here; --device cpu --smoke shows that the script works." >&2
    exit 2
  }
fi

failed=()
stage() { # NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and note what came of it
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  [[ -z $smoke ]] || limit=120 # for a core that has other things to do
  echo "== $name, at most $limit s" | tee -a "$out/gpu.log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log" || code=$?
  printf '{"stage": "%s", "device": "%s", "seconds": %d, "code": %d}\n' \
    "$name" "$device" $((SECONDS - began)) "$code" >>"$out/stages.jsonl"
  case $code in
    0) ;;
    124 | 137) failed+=("$name ran out of time, call again to go on") ;;
    *) failed+=("$name failed with code $code") ;;
  esac
}

tests=(tests/optim/test_on_devices.py)
steps=(--networks mlp-small vgg13 resnet18 resnet50 vit-b16 gpt2 --runs 15 --training-runs 6)
grid=$benchmarks/gpu.yaml
if [[ -z $smoke ]]; then
  tests+=(tests/optim/test_triton_kernels.py)
else
  steps=(--networks mlp-small --runs 2 --training-runs 2 --batch 4)
  grid=$benchmarks/gpu_smoke.yaml
fi

# Without the options of pyproject.toml, which need pytest-xdist.
stage tests 95 "$python" -m pytest -o addopts= -p no:cacheprovider -m "" -q -rs -k "$device]" "${tests[@]}"
stage steps 145 "$python" $benchmarks/step_overhead.py --out "$out" --device "$device" "${steps[@]}" \
  --optimizers sgd-m adamw --rules unit --parts step host training pause --autocast
stage training 205 "$python" $benchmarks/accuracy.py --grid "$grid" --data "$data" --out "$out/training.jsonl" \
  --device "$device"
stage "table of steps" 12 "$python" $benchmarks/step_overhead.py --out "$out" --report
stage "table of training" 12 "$python" $benchmarks/report.py "$out/training.jsonl" --grid "$grid" --out "$out" \
  --name TRAINING --no-figure

[[ -z $smoke ]] || echo "This was a smoke run: the figures mean nothing." | tee -a "$out/gpu.log"
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" | tee -a "$out/gpu.log" >&2
  exit 1
fi
echo "All stages have ended well in $SECONDS s; see $out." | tee -a "$out/gpu.log"
