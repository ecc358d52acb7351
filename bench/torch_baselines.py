"""What the processes of bench/baseline_worker.py compute: a decision as a lab's script makes it, from pixels to an action chunk.

The whole Hugging Face model, language-model head included, and the LSTM head over the window: for one new frame with the features of the
others kept, or for all frames of the window again. Only speed is of interest, so the head's weights are random.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Kosmos2Config

from bench.eager_baseline import merged_model, random_model
from bundle.manifest import Manifest
from train.action_head import ActionHead
from train.checkpoint import load
from train.config import HeadSpec


class NotHereError(Exception):
    """Why this machine cannot run a baseline."""


def decision(task: dict[str, Any]) -> Callable[[], object]:
    """A function that makes one decision and returns when it is there; `task` is as bench/baselines.py writes it.

    Raises:
        NotHereError: a compiler or an exporter is missing.
    """
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, task["dtype"])
    if task["how"] == "compile" and device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise NotHereError("torch.compile needs a C++ compiler here")
    model = _model(task, dtype).to(device=device, dtype=dtype)
    frames = task["window_frames"] if task["window"] else 1
    step = _Forward(model, task).to(device=device, dtype=dtype).eval()
    inputs = step.inputs(frames, task, device=device, dtype=dtype)
    if task["how"] == "ort":
        return _through_onnxruntime(step, inputs, task["threads"])
    call = torch.compile(step) if task["how"] == "compile" else step

    @torch.inference_mode()
    def run() -> object:
        output = call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    return run


class _Forward(nn.Module):
    """Pixels and prompt to an action chunk."""

    def __init__(self, model: Any, task: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._latents = model.config.latent_query_num
        self._width = model.config.text_config.embed_dim
        spec = HeadSpec("velocities", 2, task["hidden"], task["layers"], latent=1, pooling=False)
        self.head = ActionHead(spec, width=self._width, chunk=task["chunk"])

    def forward(self, pixels: Tensor, ids: Tensor, shown: Tensor, history: Tensor) -> Tensor:
        """history [1, W - frames, D] are the features that are kept."""
        output = self.model(
            pixel_values=pixels,
            input_ids=ids,
            image_embeds_position_mask=shown,
            use_cache=False,
            output_hidden_states=True,
            return_dict=True,
        )
        features = output.hidden_states[-1][:, -2][None]
        chunk: Tensor = self.head(torch.cat([history, features], dim=1))[:, -1]
        # Whoever exports or compiles this must not find out that nobody reads the words' probabilities.
        return torch.cat([chunk.flatten(1), output.logits[-1, -1, :1][None]], dim=1)

    def inputs(self, frames: int, task: dict[str, Any], *, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """<s>, image, text, the action token's slot, </s>, for each frame."""
        size = self.model.config.vision_config.image_size
        images = self._latents
        length = task["tokens"] + 1 + (images if task["packing"] == "upstream" else 0)
        length = max(length, images + 3)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn((frames, 3, size, size), generator=generator)
        ids = torch.randint(4, self.model.config.text_config.vocab_size, (frames, length), generator=generator)
        shown = torch.zeros_like(ids)
        shown[:, 1 : images + 1] = 1
        history = torch.zeros((1, task["window_frames"] - frames, self._width))
        return (
            pixels.to(device=device, dtype=dtype),
            ids.to(device),
            shown.to(device),
            history.to(device=device, dtype=dtype),
        )


def _model(task: dict[str, Any], dtype: torch.dtype) -> Any:
    if task["checkpoint"] is not None:
        return merged_model(load(Path(task["checkpoint"]), packing=task["packing"]))
    return random_model(dimensions(Path(task["folder"])), dtype)


def dimensions(folder: Path) -> Kosmos2Config:
    """Of the model that a bundle was made from; the widths between the two layers of a block stand in its graphs alone.

    Raises:
        NotHereError: they do not.
    """
    manifest = Manifest.load(folder)
    dims = manifest.dimensions
    inner = {name: _ffn_width(folder / manifest.stages[name].graphs[0].file) for name in ("vision", "language")}
    return Kosmos2Config(
        text_config={
            "vocab_size": dims.vocab_size,
            "embed_dim": dims.embed_dim,
            "layers": dims.text_layers,
            "attention_heads": dims.text_heads,
            "ffn_dim": inner["language"],
        },
        vision_config={
            "hidden_size": dims.vision_width,
            "num_hidden_layers": dims.vision_layers,
            "num_attention_heads": dims.vision_heads,
            "intermediate_size": inner["vision"],
            "image_size": dims.image_size,
        },
        latent_query_num=dims.image_tokens,
    )


def _ffn_width(graph: Path) -> int:
    import onnx

    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if tensor.name == "layers.0/fc1.weight":
            return int(tensor.dims[0])
    raise NotHereError(f"{graph.name} does not tell the model's dimensions: pass --checkpoint")


def _through_onnxruntime(step: _Forward, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """torch's own exporter, ONNX Runtime's own optimizer, nothing of ours."""
    import onnxruntime

    names = ("pixels", "ids", "shown", "history")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "plain.onnx")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an exporter that is on its way out, and of what tracing cannot see
            torch.onnx.export(
                step, inputs, path, input_names=names, output_names=("action",), opset_version=17, dynamo=False
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        available = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(path, options, providers=[name for name in wanted if name in available])
        del step.model  # before the first run, that both need not fit into memory
    feeds = {
        name: tensor.numpy(force=True)
        for name, tensor in zip(names, inputs, strict=True)
        if name in {each.name for each in session.get_inputs()}
    }
    return lambda: session.run(None, feeds)
