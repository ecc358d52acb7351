"""Synthetic checkpoints look like the labs' to the key, and behave like a trained policy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2Model

from bundle.errors import ConfigError, StorageError
from episodes.reader import open_episode
from tests.checkpoints import GO_LEFT, GO_RIGHT, configs, file_size_limit, read
from tests.oracle import CASES, oracle_case, oracle_keys
from tests.train.conftest import MakeSynthetic
from train.checkpoint import LoadedPolicy, load
from train.synthetic import SyntheticFiles, SyntheticOptions, make_checkpoint, total_bytes
from train.synthetic_layout import dimensions, is_trained, state_keys
from train.synthetic_records import training_config
from train.synthetic_tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "<grounding>An image of a robot {}"
ORACLE_VOCAB = 1122
VARIANTS = {
    "lora_7d": SyntheticOptions(),
    "lora_vel2_plus_grip": SyntheticOptions(action_dim=3),
    "frozen_nolora_7d": SyntheticOptions(lora=False),
    "fork2dof_patched": SyntheticOptions(layout="fork", head="velocities"),
    "fork2dof_stock": SyntheticOptions(layout="fork", head="velocities"),
}


def listed(options: SyntheticOptions) -> list[tuple[str, tuple[int, ...]]]:
    return [(key.raw, tuple(key.shape)) for key in state_keys(options)]


# --- the layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listing", "lora"), [("real_keys_lora_r32_7d.txt", True), ("real_keys_frozen_nolora_7d.txt", False)]
)
def test_full_size_has_exactly_the_real_keys_and_shapes(listing: str, lora: bool) -> None:
    assert listed(SyntheticOptions(size="full", lora=lora, hidden_size=1024)) == oracle_keys(listing)


@pytest.mark.parametrize("name", CASES)
def test_tiny_has_exactly_the_recorded_keys_and_shapes(name: str) -> None:
    vocab = dimensions("tiny").kosmos.text_config.vocab_size
    recorded = [
        (key, tuple(vocab if size == ORACLE_VOCAB else size for size in shape))
        for key, shape in oracle_keys(f"{name}/keys.txt")
    ]
    assert listed(VARIANTS[name]) == recorded


@pytest.mark.parametrize("name", CASES)
def test_records_and_config_have_the_recorded_keys(synthetic: MakeSynthetic, name: str) -> None:
    case = oracle_case(name)
    recorded = read(case.checkpoint)
    content = read(synthetic(VARIANTS[name]).checkpoint)
    # Cases that were not trained lack what training adds.
    assert content.keys() >= recorded.keys()
    assert content.keys() == read(oracle_case("lora_7d").checkpoint).keys()
    assert content["hyper_parameters"].keys() == recorded["hyper_parameters"].keys()
    ours, theirs = configs(content), configs(recorded)
    assert ours.keys() == theirs.keys()
    assert ours["act_head"].keys() == theirs["act_head"].keys()
    assert ours["train_setup"].keys() >= theirs["train_setup"].keys()


def test_the_optimizer_has_a_state_for_every_trained_tensor(upstream: SyntheticFiles) -> None:
    recorded = read(oracle_case("lora_7d").checkpoint)["optimizer_states"][0]
    optimizer = read(upstream.checkpoint)["optimizer_states"][0]
    shapes = [key.shape for key in state_keys(SyntheticOptions()) if is_trained(key.name)]
    unique = shapes[: len(optimizer["state"])]  # aliases come last

    assert optimizer["param_groups"][0].keys() == recorded["param_groups"][0].keys()
    assert optimizer["param_groups"][0]["params"] == list(optimizer["state"]) == list(recorded["state"])
    for state, theirs, shape in zip(optimizer["state"].values(), recorded["state"].values(), unique, strict=True):
        assert state.keys() == theirs.keys()
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == theirs["exp_avg"].shape == shape
        assert state["exp_avg_sq"].min() >= 0


def test_aliases_share_their_storage_in_the_file(upstream: SyntheticFiles) -> None:
    state = read(upstream.checkpoint)["state_dict"]
    pointers: dict[str, set[int]] = {}
    for key in state_keys(SyntheticOptions()):
        pointers.setdefault(key.name, set()).add(state[key.raw].data_ptr())
    assert {len(found) for found in pointers.values()} == {1}
    assert len(set.union(*pointers.values())) == len(pointers)


def test_old_peft_differs_in_names_only(synthetic: MakeSynthetic) -> None:
    new, old = (synthetic(SyntheticOptions(peft=peft)) for peft in ("new", "old"))
    new_state, old_state = (read(files.checkpoint)["state_dict"] for files in (new, old))
    assert [key.replace(".base_layer.", ".") for key in new_state] == list(old_state)
    assert not any("base_layer" in key for key in old_state)
    assert all(torch.equal(*pair) for pair in zip(new_state.values(), old_state.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SyntheticOptions(), {"type": "LSTMDecoder", "action_dim": 7, "latent": 1, "down_sample": "none"}),
        (SyntheticOptions(head="velocities"), {"type": "MobileVLALSTMDecoder", "action_dim": 2}),
        (SyntheticOptions(head="classes"), {"type": "MobileVLAClassificationDecoder", "num_classes": 9}),
        (SyntheticOptions(latent=2, pooling=True), {"latent": 2, "down_sample": "pooling"}),
        (SyntheticOptions(size="full"), {"hidden_size": 512}),
    ],
)
def test_the_config_says_what_the_options_say(options: SyntheticOptions, expected: dict[str, object]) -> None:
    assert training_config(options)["act_head"].items() >= expected.items()


@pytest.mark.parametrize("options", [{"latent": 0}, {"action_dim": 1}, {"hidden_size": 0}, {"action_dim": -1}])
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"no policy has these dimensions\n  got: .*\n  expected: at least 1, 2"):
        make_checkpoint(tmp_path / "x", SyntheticOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


# --- the base -----------------------------------------------------------------------------------------------------------


def test_the_base_is_a_hugging_face_model(synthetic: MakeSynthetic) -> None:
    files = synthetic(SyntheticOptions(lora=False))
    model, report = Kosmos2Model.from_pretrained(files.base, attn_implementation="eager", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load(files.checkpoint).policy.backbone.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_a_base_without_weights_has_the_rest(synthetic: MakeSynthetic) -> None:
    base = synthetic(SyntheticOptions(base_weights=False)).base
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(("vocab", "grounding"), [(1200, 1199), (65037, 64012)])
def test_the_tokenizer_has_the_real_ones_ids_and_template(vocab: int, grounding: int) -> None:
    tokenizer = Tokenizer.from_str(make_tokenizer(vocab).to_str())
    assert tokenizer.get_vocab_size() == vocab
    assert [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.token_to_id("<grounding>") == grounding
    encoding = tokenizer.encode(PROMPT.format(GO_LEFT))
    assert encoding.ids[:2] == [0, grounding]
    assert encoding.tokens[2:5] == ["▁An", "▁image", "▁of"]
    assert encoding.ids[-1] == 2
    assert 15 <= len(encoding) <= 25
    assert len(set(encoding.ids) - set(tokenizer.encode(PROMPT.format(GO_RIGHT)).ids)) == 1


def test_the_full_vocabulary_has_kosmos_tags_where_they_belong() -> None:
    tokenizer = make_tokenizer(65037)
    wanted = {"<mask>": 64001, "<image>": 64003, "</image>": 64004, "<patch_index_0000>": 64013}
    assert {token: tokenizer.token_to_id(token) for token in wanted} == wanted
    assert tokenizer.token_to_id("<patch_index_1023>") == 65036


@pytest.mark.parametrize(
    "text", ["", "왼쪽으로 가", "¿dónde? 🤖", "tab\tand\nline", "\x00\x7f", "UPPER lower 0123456789"]
)
def test_any_text_is_tokenised_without_unknowns(text: str) -> None:
    tokenizer = make_tokenizer(1200)
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<unk>") not in ids
    assert tokenizer.decode(ids).split() == text.split()


def test_a_vocabulary_too_small_for_any_text_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        make_tokenizer(300)


# --- the file -----------------------------------------------------------------------------------------------------------


def test_equal_options_make_equal_files_and_another_seed_another_policy(tmp_path: Path) -> None:
    options = SyntheticOptions(layout="fork", head="velocities")
    first, second = (make_checkpoint(tmp_path / name, options) for name in "ab")
    other = make_checkpoint(tmp_path / "c", dataclasses.replace(options, seed=1))
    assert first.checkpoint.read_bytes() == second.checkpoint.read_bytes()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (first.base / name).read_bytes() == (second.base / name).read_bytes()
    ours, theirs = (load(files.checkpoint, packing="upstream").state for files in (first, other))
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours)


def test_progress_adds_up(tmp_path: Path) -> None:
    options = SyntheticOptions(layout="fork", head="velocities")
    done: list[int] = []
    make_checkpoint(tmp_path, options, done.append)
    assert sum(done) == pytest.approx(total_bytes(options), rel=0.02)


@pytest.mark.parametrize(
    ("limit", "failing"), [(500, "config.json"), (500_000, "model.safetensors"), (2_000_000, "ckpt")]
)
def test_a_full_disk_leaves_old_files_and_no_rubbish(tmp_path: Path, limit: int, failing: str) -> None:
    files = make_checkpoint(tmp_path, SyntheticOptions())
    before = files.checkpoint.read_bytes()
    with file_size_limit(limit), pytest.raises(StorageError, match=rf"{failing}\n  got:      File too large"):
        make_checkpoint(tmp_path, SyntheticOptions(seed=1))
    assert files.checkpoint.read_bytes() == before
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"base", files.checkpoint.name, "config.json", "tokenizer.json", "model.safetensors"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot make the folder .*base\n  got:      Not a directory"):
        make_checkpoint(tmp_path / "file", SyntheticOptions())


# --- behaviour ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a policy sees: two clips of 8 similar frames, and two instructions that differ in a word."""

    loaded: LoadedPolicy
    pixels: Tensor
    left: Tensor
    right: Tensor

    def features(self, pixels: Tensor, ids: Tensor) -> Tensor:
        policy = self.loaded.policy
        ids = ids.expand(len(pixels), -1)
        return policy.features(policy.image_tokens(pixels), ids, torch.ones_like(ids))

    def last_chunk(self, features: Tensor) -> Tensor:
        chunks: Tensor = self.loaded.policy.act_head(features[None])
        return chunks[0, -1]


@pytest.fixture(
    scope="module",
    params=[
        SyntheticOptions(),
        SyntheticOptions(lora=False),
        SyntheticOptions(layout="fork", head="velocities"),
        SyntheticOptions(layout="fork", head="classes"),
        SyntheticOptions(size="small", layout="fork", head="velocities"),
    ],
    ids=lambda options: f"{options.size}-{options.head}-{'lora' if options.lora else 'frozen'}",
)
def scene(synthetic: MakeSynthetic, request: pytest.FixtureRequest) -> Scene:
    files = synthetic(request.param)
    tokenizer = Tokenizer.from_file(str(files.base / "tokenizer.json"))
    left, right = (torch.tensor([tokenizer.encode(PROMPT.format(text)).ids]) for text in (GO_LEFT, GO_RIGHT))
    generator = torch.Generator().manual_seed(0)
    place = torch.randn(2, 1, 3, 14, 14, generator=generator)
    drift = 0.3 * torch.randn(2, 8, 3, 14, 14, generator=generator)
    pixels = torch.nn.functional.interpolate((place + drift).flatten(0, 1), size=(224, 224), mode="bilinear")
    return Scene(load(files.checkpoint, packing="upstream"), pixels, left, right)


@torch.inference_mode()
def test_activations_neither_vanish_nor_explode(scene: Scene) -> None:
    sizes: list[float] = []
    backbone = scene.loaded.policy.backbone
    layers = [*backbone.vision_model.model.encoder.layers, *backbone.text_model.model.layers]
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output: sizes.append(
                (output[0] if isinstance(output, tuple) else output).std().item()
            )
        )
        for layer in layers
    ]
    features = scene.features(scene.pixels[:2], scene.left)
    for hook in hooks:
        hook.remove()
    assert len(sizes) == len(layers)
    assert min(sizes) > 0.5
    assert max(sizes) < 5
    assert 0.5 < features.std() < 2


@torch.inference_mode()
def test_the_action_depends_on_image_instruction_and_history(scene: Scene) -> None:
    features = scene.features(scene.pixels, scene.left)
    first, second = features[:8], features[8:]
    chunk = scene.last_chunk(first)
    changed = {
        "image": scene.last_chunk(second),
        "last frame": scene.last_chunk(torch.cat([first[:-1], second[-1:]])),
        "instruction": scene.last_chunk(scene.features(scene.pixels[:8], scene.right)),
        "history": scene.last_chunk(torch.cat([second[:-1], first[-1:]])),
        "order of history": scene.last_chunk(first[[3, 1, 2, 0, 6, 5, 4, 7]]),
        "no history": scene.last_chunk(first[-1:]),
    }
    for name, other in changed.items():
        assert (chunk - other).abs().max() > 1e-3, name


@torch.inference_mode()
def test_actions_are_spread_and_not_saturated(scene: Scene) -> None:
    chunk = scene.last_chunk(scene.features(scene.pixels[:8], scene.left))
    assert chunk.std() > 0.1
    if scene.loaded.policy.spec.head.kind == "velocities":
        assert chunk.abs().max() < 0.999


@torch.inference_mode()
def test_adapters_and_the_action_token_move_the_action(upstream: SyntheticFiles) -> None:
    pixels, ids = torch.randn(1, 3, 224, 224), torch.arange(5, 20)[None]

    def action(policy_of: LoadedPolicy) -> Tensor:
        policy = policy_of.policy
        chunks: Tensor = policy(pixels[None, :, None], ids, torch.ones_like(ids))
        return chunks

    expected = action(load(upstream.checkpoint))
    for part in ("lora_B", "lora_A", "action_token"):
        changed = load(upstream.checkpoint)
        for name, parameter in changed.policy.named_parameters():
            if part in name:
                assert parameter.abs().max() > 0
                parameter.zero_()
        assert (action(changed) - expected).abs().max() > 1e-2, part


def test_no_tensor_is_trivial(upstream: SyntheticFiles) -> None:
    for name, tensor in load(upstream.checkpoint).state.items():
        assert tensor.std() > 0, name
        is_gamma = any(part in name for part in ("norm", "_ln")) and name.endswith(".weight")
        assert abs(tensor.mean() - (1.0 if is_gamma else 0.0)) < 0.2, name


def test_the_same_tensors_stand_behind_every_head_and_camera(synthetic: MakeSynthetic) -> None:
    one = load(synthetic(SyntheticOptions()).checkpoint).state
    two = load(synthetic(SyntheticOptions(layout="fork", head="velocities")).checkpoint, packing="upstream").state
    backbone = [name for name in one if name.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(one[name], two[name]) for name in backbone)


# --- the script ---------------------------------------------------------------------------------------------------------


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "make_fixtures"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_script_makes_a_checkpoint_a_base_and_an_episode_of_each_schema(tmp_path: Path) -> None:
    arguments = ["--layout", "fork", "--head", "velocities", "--no-base-weights", "--json"]
    result = run_script("--out", str(tmp_path / "new"), *arguments)
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout)
    assert written.keys() == {"checkpoint", "base", "episode v1", "episode v5", "episode v5_jpeg", "episode v6"}
    assert load(Path(written["checkpoint"]), packing="upstream").base.folder == Path(written["base"])
    with open_episode(written["episode v5_jpeg"]) as episode:
        assert len(episode) == 18
        assert np.asarray(episode.frame(0)).shape == (720, 1280, 3)


def test_the_script_reports_what_a_user_can_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_script("--out", str(tmp_path / "file"), "--no-episodes")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "error: StorageError" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
