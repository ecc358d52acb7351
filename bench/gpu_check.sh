#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command and about ten minutes: full-size engines built for this GPU, their parity with the
# fp32 reference over 64 streamed frames, and the step's times against PyTorch eager, torch.compile and ONNX Runtime in the same run.
#
#     bench/gpu_check.sh [WORK_FOLDER [WHEELS_FOLDER]]
#
# Needs Python 3.10 or newer with torch and onnx, an NVIDIA driver, 16 GB of memory and 25 GB of disk. Packages that are missing are installed
# with pip into WORK_FOLDER/site: all wheels of WHEELS_FOLDER if one is given (a machine without a network), else from the index. Wheels of
# TensorRT-RTX are four, two of them made from sources: pip wheel tensorrt-rtx cuda-bindings -w WHEELS_FOLDER.
# SIZE=tiny runs the same steps with a toy model, to try the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-/tmp/jetvla-gpu-check}
wheels=${2:-}
size=${SIZE:-full}
mkdir -p "$work"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"

missing=$(python3 - <<'PYTHON'
import importlib.util

modules = {
    "msgspec": "msgspec", "tyro": "tyro", "rich": "rich", "filelock": "filelock", "PIL": "pillow", "psutil": "psutil", "onnx": "onnx",
    "transformers": "transformers", "peft": "peft", "safetensors": "safetensors", "tokenizers": "tokenizers", "h5py": "h5py",
    "onnxruntime": "onnxruntime", "tensorrt_rtx": "tensorrt-rtx",
}
print(" ".join(package for module, package in modules.items() if importlib.util.find_spec(module) is None))
try:
    import cuda.bindings.driver
except ImportError:
    print("cuda-bindings")
PYTHON
)
if [[ -n $missing && -n $wheels ]]; then
    # --no-deps: whoever carried the wheels decided what belongs to them.
    echo "gpu_check: installing all of $wheels; missing were:" $missing >&2
    python3 -m pip install -q --no-index --no-deps --target "$work/site" "$wheels"/*.whl >&2
elif [[ -n $missing ]]; then
    echo "gpu_check: installing" $missing >&2
    python3 -m pip install -q --target "$work/site" $missing >&2
fi

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv >&2 || echo "gpu_check: no nvidia-smi" >&2
if ! ls "$work"/fixtures/*.ckpt >/dev/null 2>&1; then
    python3 scripts/make_fixtures --size "$size" --layout fork --head velocities --no-episodes --out "$work/fixtures" >&2
fi
checkpoint=$(ls "$work"/fixtures/*.ckpt | head -1)
python3 export/build_engines.py "$checkpoint" --packing upstream --precision fp16 --max-prompt-tokens 24 --verify-frames 64 \
    --out "$work/policy.bundle" >&2 || echo "gpu_check: the build failed (exit code $?); what was built is measured" >&2
python3 bench/gpu_check.py "$work/policy.bundle" "$checkpoint" --packing upstream ${GPU_CHECK_OPTIONS:-}
