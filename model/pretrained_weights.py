"""Weights in and out in Hugging Face's layout, one tensor at a time.

Reading copies each tensor (under FSDP2: this rank's slice of it) from the safetensors file into the parameter; writing
appends each tensor to the file as it is gathered. Neither ever holds a second model: peak host memory is one tensor
above what the model itself holds on this rank (benchmarks/benchmark_load_memory.py measures it).
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.config import ModelConfig, check_token_ids, config_from_hf, config_to_hf, count_parameters
from model.folder_json import ModelFolderError, first_line, read_json_object
from model.tokenizer import Tokenizer, check_vocabulary_fits, load_tokenizer
from model.transformer import Transformer
from model.value_model import ValueModel
from printable import listed, one_line, shown

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VALUE_HEAD_FILE = "value_head.safetensors"  # of a ValueModel's folder, next to its backbone's files
GENERATION_FILE = "generation_config.json"
TRAINING_FILE = "tl_training.json"  # ours: how the model was trained (data/trained_format.py)
DEFAULT_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 32 << 20  # of one safetensors file; a header takes about 100 bytes per tensor

# Files that belong to the tokenizer or to generation: copied unchanged from the folder the run started with.
COMPANION_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION_FILE,
)

_FLOAT_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OUTER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "value_head.weight": "value_head.weight",
    "value_head.bias": "value_head.bias",
}
_BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hf_name(our_name: str) -> str:
    """Hugging Face's name of a parameter: layers.3.attention.wq.bias -> model.layers.3.self_attn.q_proj.bias.

    A ValueModel's `backbone.` is dropped; its value head, unknown to Hugging Face, keeps its name.
    """
    our_name = our_name.removeprefix("backbone.")
    if our_name in _OUTER_NAMES:
        return _OUTER_NAMES[our_name]
    _, layer, rest = our_name.split(".", 2)
    stem, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_BLOCK_NAMES[stem]}.{kind}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_pretrained(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """The model of a folder in Hugging Face layout (config.json and safetensors), in the given dtype and place.

    Raises ModelFolderError, one line, for whatever is wrong with the folder.
    """
    config = sized_config(model_dir)
    with torch.device("meta"):  # no memory and no random numbers are spent on weights about to be overwritten
        model = Transformer(config).to(dtype)
    load_weights_into(model, model_dir, device=device)
    return model


def load_value_model(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ValueModel:
    """The critic of a folder that save_value_model wrote, or of a language model's: then with a value head of zeros.

    Raises ModelFolderError, one line, for whatever is wrong with the folder.
    """
    config = sized_config(model_dir)
    with torch.device("meta"):
        model = ValueModel(config).to(dtype)
    load_value_weights_into(model, model_dir, device=device)
    return model


def read_config(model_dir: str | Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json. Raises ModelFolderError naming the file."""
    path = Path(model_dir) / "config.json"
    try:
        return config_from_hf(read_json_object(path))
    except ModelFolderError as error:
        message = str(error)
        raise ModelFolderError(
            message if message.startswith(str(path)) else f"{path}: {message.removeprefix('config.json: ')}"
        ) from None


def sized_config(model_dir: str | Path) -> ModelConfig:
    """read_config, after a look at the weight files' headers: they must hold about as many numbers as the config says.

    Even an empty model of a wrong config (a thousand layers, a billion rows) can take minutes and terabytes. Where the
    config asks for up to twice what is stored, load_weights_into names each tensor that differs.
    """
    config, held = read_config(model_dir), 0
    files = tensor_files(Path(model_dir))
    for path in sorted(set(files.values())):
        with _open(path) as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, no dict
    if count_parameters(config) > 2 * held:
        raise ModelFolderError(
            f"{model_dir}: config.json describes a model of {count_parameters(config)} parameters, the weight files "
            f"hold {held}"
        )
    return config


def check_folder(model_dir: str | Path, tokenizer: Tokenizer) -> ModelConfig:
    """The config of a folder in which everything fits, as far as it can be known without reading a weight.

    Settings, tensor names, shapes and types, the tokenizer's size, the token ids of generation_config.json. A run calls
    this first: a folder that it cannot use, or could not export, ends it before any memory or time is spent. Raises
    ModelFolderError.
    """
    config = sized_config(model_dir)
    check_vocabulary_fits(tokenizer, config.vocab_size)
    _generation_settings(Path(model_dir), config.vocab_size)
    with torch.device("meta"):
        targets = {hf_name(name): parameter for name, parameter in Transformer(config).state_dict().items()}
    _check_headers(Path(model_dir), tensor_files(Path(model_dir)), targets, may_hold_head=config.tie_embeddings)
    return config


def _generation_settings(model_dir: Path, vocab_size: int) -> dict[str, Any] | None:
    """The content of generation_config.json, None where there is none. Raises ModelFolderError, also for token ids."""
    path = model_dir / GENERATION_FILE
    if not path.exists():
        return None
    settings = read_json_object(path)
    try:
        check_token_ids(settings, vocab_size)
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    return settings


def check_same_shape(policy_dir: str | Path, other_dir: str | Path, role: str) -> None:
    """Raises ModelFolderError when other_dir is a model of another shape or formula than policy_dir.

    role: "reference" or "critic", named in the message with every field that differs. max_positions is not compared,
    it enters no computation; neither is a critic's tie_embeddings, since it has no output head.
    """
    policy, other = read_config(policy_dir), read_config(other_dir)
    ignored = {"max_positions", "tie_embeddings"} if role == "critic" else {"max_positions"}
    differing = [
        f"{field.name} {getattr(other, field.name)} (expected {getattr(policy, field.name)})"
        for field in fields(ModelConfig)
        if field.name not in ignored and getattr(other, field.name) != getattr(policy, field.name)
    ]
    if differing:
        raise ModelFolderError(
            f"{other_dir}: found a {role} of another shape than the policy {policy_dir}: {', '.join(differing)}"
        )


@torch.no_grad()
def load_weights_into(model: Transformer, model_dir: str | Path, *, device: torch.device | str = "cpu") -> None:
    """Fills a model's parameters from the folder's safetensors, tensor by tensor, converting to the parameters' dtype.

    1. find the file of every tensor, 2. compare names, shapes and dtypes of the headers with the model, 3. give
    parameters on the meta device storage on `device`, 4. copy. FSDP2 parameters (DTensor) receive this rank's slice,
    nothing else of the tensor is read, and no collective is used. Raises ModelFolderError before any parameter is
    touched if a tensor is missing, unexpected or mis-shaped (all are named).
    """
    files = tensor_files(Path(model_dir))
    targets = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    _check_headers(Path(model_dir), files, targets, may_hold_head=model.config.tie_embeddings)
    if any(parameter.is_meta for parameter in targets.values()):
        model.to_empty(device=device)
        targets = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    for name, parameter in targets.items():
        _copy_slice(files[name], name, parameter)
    if model.config.tie_embeddings and "lm_head.weight" in files:
        _check_tied_head(files)


@torch.no_grad()
def load_value_weights_into(model: ValueModel, model_dir: str | Path, *, device: torch.device | str = "cpu") -> None:
    """load_weights_into for a critic: the backbone as there, a language model's output head unread.

    The value head comes from VALUE_HEAD_FILE; a folder without that file gives a head of zeros. Raises ModelFolderError
    before any parameter is touched.
    """
    head_file = Path(model_dir) / VALUE_HEAD_FILE
    has_head = head_file.is_file()
    files = tensor_files(Path(model_dir))
    if has_head:
        files |= dict.fromkeys(_open_names(head_file), head_file)
    targets = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    head_names = {name for name in targets if name.startswith("value_head.")}
    expected = {name: parameter for name, parameter in targets.items() if has_head or name not in head_names}
    _check_headers(Path(model_dir), files, expected, may_hold_head=True)
    if any(parameter.is_meta for parameter in targets.values()):
        model.to_empty(device=device)
        targets = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    for name, parameter in targets.items():
        if name in expected:
            _copy_slice(files[name], name, parameter)
        else:
            parameter.zero_()


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Which file holds each tensor: model.safetensors if it is there, else what the index says, else all *.safetensors.

    The single file wins over an index, as in transformers: shards next to it are those of an older export. The index
    must be well-formed all the same. The value head's file is not among them. Raises ModelFolderError when the folder
    has no weights or its index is wrong.
    """
    if not model_dir.is_dir():
        raise ModelFolderError(f"{model_dir}: no such folder, expected a model in Hugging Face layout")
    single, index = model_dir / WEIGHTS_FILE, model_dir / INDEX_FILE
    has_single = os.path.lexists(single)
    if has_single and not single.is_file():  # never other weights instead of those whose link is broken
        raise ModelFolderError(f"{single}: found a broken link, a folder or a pipe, expected a file")
    weight_map = _read_weight_map(index) if os.path.lexists(index) else None
    if weight_map is not None and not has_single:
        return _files_of_index(index, weight_map)
    paths = [single] if has_single else sorted(model_dir.glob("*.safetensors"))
    paths = [path for path in paths if path.name != VALUE_HEAD_FILE and path.is_file()]
    if not paths:
        others = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for p in model_dir.glob(pattern))
        found = f"found {listed(others)}" if others else "found none"
        raise ModelFolderError(f"{model_dir}: no weights, {found}, expected {WEIGHTS_FILE} or shards with {INDEX_FILE}")
    files: dict[str, Path] = {}
    for path in paths:
        for name in _open_names(path):
            if name in files:
                raise ModelFolderError(
                    f"{path}: tensor {one_line(name, 120)} is also in {files[name].name}, expected it once"
                )
            files[name] = path
    return files


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of a file next to the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelFolderError(f"{index}: found no weight_map object of tensor names to file names")
    outside = sorted({f for f in weight_map.values() if Path(f).name != f or "\0" in f or len(f) > 255})
    if outside:
        raise ModelFolderError(f"{index}: weight_map points to {listed(outside)}, expected names of files next to it")
    return weight_map


def _files_of_index(index: Path, weight_map: dict[str, str]) -> dict[str, Path]:
    absent = sorted({f for f in weight_map.values() if not _is_file(index.parent / f)})
    if absent:
        raise ModelFolderError(f"{index}: weight files missing from the folder: {listed(absent)}")
    held = {f: set(_open_names(index.parent / f)) for f in sorted(set(weight_map.values()))}
    wrong = [f"{name} ({f})" for name, f in weight_map.items() if name not in held[f]]
    if wrong:
        raise ModelFolderError(f"{index}: tensors that are not in the file the index names: {listed(wrong)}")
    wrong = [f"{name} ({f})" for f, names in held.items() for name in sorted(names) if weight_map.get(name) != f]
    if wrong:
        raise ModelFolderError(f"{index}: tensors in a file for which the index does not name them: {listed(wrong)}")
    return {name: index.parent / f for name, f in weight_map.items()}


def _check_headers(model_dir: Path, files: dict[str, Path], targets: dict[str, Tensor], *, may_hold_head: bool) -> None:
    """Compares the files' headers with the model and reports everything that differs in one error."""
    # Old checkpoints store RoPE's frequencies; they follow from the config. A tied head may be stored a second time,
    # and a critic made from a language model leaves that one's head where it is.
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if may_hold_head:
        ignored.add("lm_head.weight")
    missing = [name for name in targets if name not in files]
    unexpected = sorted(name for name in files if name not in targets and name not in ignored)
    misshaped, not_float = [], []
    for path in sorted({files[name] for name in targets if name in files}):
        with _open(path) as file:
            for name in (n for n in targets if files.get(n) == path):
                header = file.get_slice(name)
                if list(header.get_shape()) != list(targets[name].shape):
                    found = shown(str(header.get_shape()))[1:-1]
                    misshaped.append(f"{name} (found {found}, expected {list(targets[name].shape)})")
                if header.get_dtype() not in _FLOAT_NAMES:
                    not_float.append(f"{name} ({header.get_dtype()})")
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
            ("not floating-point", not_float),
        )
        if names
    ]
    if problems:
        raise ModelFolderError(f"{model_dir}: weights do not fit config.json; {'; '.join(problems)}")


def _copy_slice(path: Path, name: str, parameter: Tensor) -> None:
    # The file is opened again for each tensor: closing it unmaps the pages read so far, which would otherwise count as
    # resident until the end and look like a second model.
    with _open(path) as file:
        if isinstance(parameter, DTensor):
            ranges = _local_ranges(parameter)
            local = parameter.to_local()
            if local.numel():
                local.copy_(file.get_slice(name)[tuple(slice(start, end) for start, end in ranges)])
        else:
            parameter.copy_(file.get_tensor(name))


def _local_ranges(parameter: DTensor) -> list[tuple[int, int]]:
    """[start, end) per dimension of this rank's part of a sharded parameter (divided as torch.chunk does)."""
    ranges = [(0, size) for size in parameter.shape]
    for mesh_dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard():
            raise ValueError(f"cannot load into a parameter placed as {placement}, expected Shard or Replicate")
        start, end = ranges[placement.dim]
        # Rounded up: the last ranks may get fewer rows, or none.
        chunk = -(-(end - start) // parameter.device_mesh.size(mesh_dim))
        first = min(start + chunk * parameter.device_mesh.get_local_rank(mesh_dim), end)
        ranges[placement.dim] = (first, min(first + chunk, end))
    return ranges


def _check_tied_head(files: dict[str, Path]) -> None:
    """config.json ties the head to the embedding; a stored head that differs would be dropped silently otherwise."""
    with _open(files["lm_head.weight"]) as head_file, _open(files["model.embed_tokens.weight"]) as embedding_file:
        head, embedding = head_file.get_slice("lm_head.weight"), embedding_file.get_slice("model.embed_tokens.weight")
        same = list(head.get_shape()) == list(embedding.get_shape())
        rows = embedding.get_shape()[0]
        for start in range(0, rows if same else 0, 4096):
            same = same and torch.equal(head[start : start + 4096], embedding[start : start + 4096])
    if not same:
        raise ModelFolderError(
            f"{files['lm_head.weight']}: lm_head.weight differs from model.embed_tokens.weight, but "
            "config.json has tie_word_embeddings true"
        )


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes <= MAX_HEADER_BYTES:
            return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(
            f"{path}: not a readable safetensors file, perhaps truncated ({first_line(error)})"
        ) from None
    raise ModelFolderError(
        f"{path}: not a readable safetensors file, perhaps truncated (a header of {header_bytes} bytes, expected at "
        f"most {MAX_HEADER_BYTES})"
    )


def _open_names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_pretrained(model: Transformer, model_dir: str | Path) -> None:
    """Writes config.json and the weights, in their own dtype, as transformers and load_pretrained read them."""
    save_pretrained_streamed(model, model_dir)


@torch.no_grad()
def save_pretrained_streamed(
    model: Transformer,
    model_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    companions_from: str | Path | None = None,
    eos_id: int | None = None,
    training: dict[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes the model in Hugging Face layout, gathering one tensor at a time; all ranks call it, rank 0 writes.

    1. plan the shards from shapes, 2. write everything into a folder with a temporary name, 3. re-open and verify, 4.
    rename, so that the final name is either absent, the previous export, or complete. dtype: of the stored tensors
    (default: as they are). companions_from: model folder whose tokenizer files are copied and whose BOS/EOS ids go
    into config.json. eos_id: the trained end of turn, which then is the EOS of config.json and of
    generation_config.json (exported_eos), so that generation stops where training taught it to. training: the content
    of TRAINING_FILE. Raises ModelFolderError on every rank when rank 0 could not write (for example a full disk),
    leaving no temporary files.
    """
    parameters = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    shards = _plan_shards(parameters, dtype, max_shard_bytes)
    hf_config = config_to_hf(model.config)
    if eos_id is not None:
        hf_config["eos_token_id"] = eos_id
    _write_folder(
        Path(model_dir), hf_config, parameters, shards, dtype=dtype, companions_from=companions_from, training=training
    )


@torch.no_grad()
def save_value_model(
    model: ValueModel,
    model_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    companions_from: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """save_pretrained_streamed for a critic: the backbone in Hugging Face layout, the value head in VALUE_HEAD_FILE.

    config.json names the architecture without a head (transformers: AutoModel); tie_word_embeddings stays as it was, so
    that the shape can be compared with the policy's. Arguments, errors and promises as there.
    """
    parameters = {hf_name(name): parameter for name, parameter in model.state_dict().items()}
    head_names = [name for name in parameters if name.startswith("value_head.")]
    backbone = {name: parameter for name, parameter in parameters.items() if name not in head_names}
    shards = {**_plan_shards(backbone, dtype, max_shard_bytes), VALUE_HEAD_FILE: head_names}
    hf_config = config_to_hf(model.config)
    hf_config["architectures"] = [name.replace("ForCausalLM", "Model") for name in hf_config["architectures"]]
    _write_folder(Path(model_dir), hf_config, parameters, shards, dtype=dtype, companions_from=companions_from)


def _write_folder(
    final: Path,
    hf_config: dict[str, Any],
    parameters: dict[str, Tensor],
    shards: dict[str, list[str]],
    *,
    dtype: torch.dtype | None,
    companions_from: str | Path | None,
    training: dict[str, Any] | None = None,
) -> None:
    """Steps 2 to 4 of an export: `shards` says which tensors of `parameters` (stored names) go into which file."""
    is_writer = not (dist.is_initialized() and dist.get_rank() != 0)
    temporary = final.with_name(f".{final.name}.incomplete")
    failure: Exception | None = None
    try:
        if is_writer:
            _prepare_folder(final, temporary)
            _write_config(hf_config, temporary, dtype or next(iter(parameters.values())).dtype, companions_from)
            if training is not None:
                (temporary / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    except (OSError, ModelFolderError) as error:
        failure = error
    for file_name, names in shards.items():
        tensors = _gathered(parameters, names, dtype, keep=is_writer)
        try:
            if is_writer and failure is None:
                write_safetensors(temporary / file_name, {n: parameters[n] for n in names}, dtype, tensors)
        except (OSError, ModelFolderError) as error:
            failure = error
        for _ in tensors:  # after a failure the other ranks still take part in the remaining collectives: join them
            pass
    try:
        if is_writer and failure is None:
            _finish_folder(final, temporary, shards, parameters, dtype)
    except (OSError, ModelFolderError) as error:
        failure = error
    if failure is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    _raise_on_all_ranks(final, failure, next(iter(parameters.values())))


def _plan_shards(
    parameters: dict[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensor names, in the model's order; no file above max_shard_bytes unless one tensor alone is."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, parameter in parameters.items():
        size = parameter.numel() * (dtype or parameter.dtype).itemsize
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _gathered(
    parameters: dict[str, Tensor], names: list[str], dtype: torch.dtype | None, *, keep: bool
) -> Iterator[Tensor]:
    """The full tensors one after the other, on the CPU in the stored dtype; a collective per tensor if sharded."""
    for name in names:
        parameter = parameters[name]
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield full.to(device="cpu", dtype=dtype or parameter.dtype).contiguous() if keep else full[:0]


def write_safetensors(
    path: Path, parameters: dict[str, Tensor], dtype: torch.dtype | None, tensors: Iterator[Tensor]
) -> None:
    """One safetensors file, written front to back: 8 bytes of header length, JSON header, the tensors' bytes."""
    stored_names = {stored: name for name, stored in _FLOAT_NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without the format
    end = 0
    for name, parameter in parameters.items():
        stored = dtype or parameter.dtype
        start, end = end, end + parameter.numel() * stored.itemsize
        header[name] = {"dtype": stored_names[stored], "shape": list(parameter.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # keeps the data aligned to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def _write_config(
    hf_config: dict[str, Any], folder: Path, dtype: torch.dtype, companions_from: str | Path | None
) -> None:
    """config.json and the companions. An eos_token_id that hf_config already has is the trained one."""
    hf_config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if companions_from is not None:
        source, trained = Path(companions_from), hf_config.get("eos_token_id")
        for name in COMPANION_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        hf_config.update(_token_ids(source))
        if trained is not None:
            hf_config["eos_token_id"] = exported_eos(hf_config.get("eos_token_id"), trained)
            settings = _generation_settings(source, hf_config["vocab_size"])
            if settings is not None:
                settings["eos_token_id"] = exported_eos(settings.get("eos_token_id"), trained)
                (folder / GENERATION_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def exported_eos(stated: int | list[int] | None, trained: int) -> int | list[int]:
    """The eos_token_id of an exported folder: the trained id alone, unless the folder listed it among others.

    Then the list stays, the trained id first: the others also end a response, as they did before training.
    """
    if isinstance(stated, list) and trained in stated:
        return [trained, *(each for each in stated if each != trained)]
    return trained


def describe_eos_change(model_dir: str | Path, eos_id: int) -> str:
    """One line for the log where an export from this folder says another eos_token_id than the folder; else ""."""
    source, changes = Path(model_dir), []
    config = read_json_object(source / "config.json")
    settings = _generation_settings(source, read_config(source).vocab_size)
    for name, values in (("config.json", config), (GENERATION_FILE, settings)):
        if values is not None and (stated := values.get("eos_token_id")) != exported_eos(stated, eos_id):
            changes.append(f"{name} said {json.dumps(stated)}, is now {json.dumps(exported_eos(stated, eos_id))}")
    return f"end of turn of the exported model (eos_token_id): {'; '.join(changes)}" if changes else ""


def _token_ids(source: Path) -> dict[str, Any]:
    """BOS/EOS/padding ids for config.json: those of the source's config.json, else the tokenizer's."""
    if (source / "config.json").is_file():
        stated = read_json_object(source / "config.json")
        return {key: stated[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in stated}
    tokenizer = load_tokenizer(source)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _is_ours(name: str) -> bool:
    return name in (*COMPANION_FILES, "config.json", INDEX_FILE, TRAINING_FILE) or name.endswith(".safetensors")


def _prepare_folder(final: Path, temporary: Path) -> None:
    if final.exists() and not final.is_dir():
        raise ModelFolderError(f"{final}: exists and is not a folder, expected a folder to write the model to")
    foreign = sorted(p.name for p in final.iterdir() if not _is_ours(p.name)) if final.is_dir() else []
    if foreign:
        raise ModelFolderError(f"{final}: holds {', '.join(foreign[:5])}, expected a new, empty or model folder")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    temporary.mkdir(parents=True)


def _finish_folder(
    final: Path, temporary: Path, shards: dict[str, list[str]], parameters: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    files = {name: file_name for file_name, names in shards.items() for name in names}
    weight_map = {name: file_name for name, file_name in files.items() if file_name != VALUE_HEAD_FILE}
    if len(set(weight_map.values())) > 1:
        total = sum(parameters[name].numel() * (dtype or parameters[name].dtype).itemsize for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    written = tensor_files(temporary)
    if VALUE_HEAD_FILE in shards:
        written |= dict.fromkeys(_open_names(temporary / VALUE_HEAD_FILE), temporary / VALUE_HEAD_FILE)
    _check_headers(temporary, written, parameters, may_hold_head=False)
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.is_dir():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _raise_on_all_ranks(final: Path, failure: Exception | None, any_parameter: Tensor) -> None:
    """One flag from rank 0 to all, so that no rank continues as if the export existed."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        local = any_parameter.to_local() if isinstance(any_parameter, DTensor) else any_parameter
        failed = torch.tensor([float(failure is not None)], device=local.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failure is None and failed.item():
            raise ModelFolderError(f"{final}: rank 0 could not write the model")
    if isinstance(failure, ModelFolderError):
        raise failure
    if failure is not None:
        raise ModelFolderError(f"{final}: the model could not be written ({first_line(failure)})") from failure
