"""`load`: from a name to a ChatModel.

Knows: named models of installed packages (entry points), model folders, hub ids, PEFT adapters, and what can be wrong with them.
Does not know: what any of these models is; a model that ships with this package comes in by the same entry point as anybody's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pvsae.errors import UserError
from pvsae.models.chatmodel import ChatModel, find_decoder

GROUP = "pvsae.models"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelShape:
    """How large a model is.

    Attributes:
        n_blocks, d_model, n_ctx: blocks, width of the residual, tokens of a context.
        parameters: of the whole model, tied ones once.
        block_parameters: of each block.
    """

    n_blocks: int
    d_model: int
    n_ctx: int
    parameters: int
    block_parameters: tuple[int, ...]


def skeleton(name: str | Path) -> Any:
    """The transformers model of a name that `load` takes, without memory for weights. UserError as `model_shape`."""
    folder = resolve_name(name)
    source = str(folder or name)
    return _skeleton(_config(source, folder, weights=False), source)


def model_shape(name: str | Path) -> ModelShape:
    """The shape of a model that `load` takes, from its config alone: weights are neither read nor needed.

    Raises: UserError as `load`, as far as the name and the config go.
    """
    folder = resolve_name(name)
    source = str(folder or name)
    config = _config(source, folder, weights=False)
    skeleton = _skeleton(config, source)
    text = config.get_text_config()
    return ModelShape(
        n_blocks=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_ctx=getattr(text, "max_position_embeddings", None) or 2**31,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in _blocks(skeleton)),
    )


def known_models() -> dict[str, Any]:
    """Names that installed packages offer (entry point group "pvsae.models"); each leads to a function that gives a folder."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attn: str = "auto",
    **chat_options: Any,
) -> ChatModel:
    """Loads a chat model.

    Args:
        name: a named model ("organism"), a local model folder, or a Hugging Face hub id.
        adapter: folder of a PEFT adapter trained on that model; its layers are put into the model and stay separate.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": float32 on a CPU, bfloat16 on a GPU.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a GPU if there is one.
        attn: "sdpa", "eager" or another implementation that transformers has; "auto" is sdpa where the model has it.
        **chat_options: passed on to ChatTemplate: `chat` ("auto" or "plain" for models without a template), `pin_date`, `system`.

    Raises: UserError for a missing folder, a folder that is not a model's, weights that do not fit or are not safetensors,
        an adapter that was made for another model, an unknown dtype or device.

    No code that comes with a model is run, and no pickle is read.
    """
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    if attn not in ATTENTION:
        raise UserError(f"attention {attn!r}", "one of " + ", ".join(ATTENTION))
    folder = resolve_name(name)
    source = str(folder or name)
    config = _config(source, folder)
    skeleton = _skeleton(config, source)
    if adapter is not None:
        adapter = Path(adapter)
        _check_adapter(adapter, skeleton, source)
    if attn == "auto":
        attn = "sdpa" if getattr(skeleton, "_supports_sdpa", True) else "eager"
    tokenizer = _tokenizer(source, folder)
    hf = _weights(source, config, torch_dtype, attn)
    if adapter is not None:
        _inject(hf, adapter)
    hf = hf.to(torch_device).eval()
    label = str(name) if adapter is None else f"{name}+{adapter}"
    model = ChatModel(hf, tokenizer, name=label, path=folder, defaults=_defaults(folder), chat_options=chat_options)
    model.chat  # noqa: B018  made now, so that a model without a template, or a wrong option, is an error of load
    return model


def resolve_name(name: str | Path) -> Path | None:
    """The folder that a name leads to, or None where it can only be a hub id."""
    points = known_models()
    if str(name) in points:
        return Path(points[str(name)].load()())
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    known = ", ".join(sorted(points)) or "none is installed"
    hint = f"a known name ({known}), a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct"
    if path.is_file():
        raise UserError(f"{path} is a file, not a model folder", hint, f"the folder it is in: {path.parent}")
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        raise UserError(f"there is no model {text!r}", hint, "check the spelling and the path")
    return None


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device that is there. UserError if it is not."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}", "auto, cpu, cuda, cuda:0, mps") from error
    missing = (
        (found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()))
        or (found.type == "mps" and not torch.backends.mps.is_available())
        or found.type == "meta"
    )
    if missing:
        raise UserError(f"device {str(device)!r} is not on this machine", "a device that torch can see", "device='auto' or 'cpu'")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A floating torch dtype; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    elif dtype in DTYPES:
        return DTYPES[dtype]
    raise UserError(f"unknown dtype {str(dtype)!r}", "auto, float32, bfloat16 or float16")


def _blocks(skeleton: Any) -> nn.ModuleList:
    decoder = find_decoder(skeleton)
    blocks = decoder.layers if hasattr(decoder, "layers") else decoder.h
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _config(source: str, folder: Path | None, *, weights: bool = True) -> Any:
    from transformers import AutoConfig

    if folder is not None:
        if not (folder / "config.json").is_file():
            fix = "load the base model, and give this folder as adapter=" if (folder / "adapter_config.json").is_file() else ""
            raise UserError(f"{folder} is not a model folder: it has no config.json", "a folder that save_pretrained wrote", fix)
        if weights and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder} has no weights in safetensors format",
                "model.safetensors (pickled .bin weights are not read, since a pickle can run code)",
                "convert them once with transformers' save_pretrained",
            )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no model config could be read for {source!r}: {_first_line(error)}",
            "a model folder, or a hub id that can be reached, of an architecture that transformers has",
            "check the name and the network, or download the model and give its folder",
        ) from error


def _skeleton(config: Any, source: str) -> Any:
    """The model without memory for weights, to check things against before the long work of reading them."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{source!r} is not a causal language model that can be run here: {_first_line(error)}",
            "a decoder-only model, such as Llama, Qwen, Gemma or Mistral",
        ) from error
    find_decoder(skeleton)
    return skeleton


def _tokenizer(source: str, folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    if folder is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the model's class.
        raise UserError(
            f"{folder} has no tokenizer", "tokenizer.json beside the weights", "save the tokenizer into the same folder"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no tokenizer could be read for {source!r}: {_first_line(error)}", "tokenizer.json beside the weights"
        ) from error


def _weights(source: str, config: Any, dtype: torch.dtype, attn: str) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights of {source!r} could not be loaded: {_first_line(error)}",
            "complete safetensors weights that fit config.json",
            "download or save the model again",
        ) from error
    hf, info = loaded
    lacking = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if lacking:
        # transformers would go on with random values in their place.
        raise UserError(
            f"{source!r} lacks {len(lacking)} of the model's weights, or has them in another shape, such as {lacking[0]}",
            "weights for every parameter of config.json's model",
            "download or save the model again",
        )
    return hf


def _check_adapter(adapter: Path, skeleton: Any, source: str) -> None:
    """Compares an adapter's tensors with the modules they are for, before any weight is read."""
    from safetensors import SafetensorError, safe_open

    weights = adapter / "adapter_model.safetensors"
    for needed in (adapter / "adapter_config.json", weights):
        if not needed.is_file():
            raise UserError(
                f"{adapter} is not an adapter folder: it has no {needed.name}",
                "adapter_config.json and adapter_model.safetensors",
            )
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(weights, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  not a dict
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{adapter} is a damaged adapter: {_first_line(error)}", "the folder as PEFT saved it") from error
    if settings.get("peft_type") == "LORA":
        modules = dict(skeleton.named_modules())
        for key, shape in shapes.items():
            name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            module = modules.get(name)
            wanted = _lora_side(module, part)
            if module is None or (wanted is not None and shape[wanted[0]] != wanted[1]):
                there = "no such module" if module is None else f"{wanted[1] if wanted else '?'} features there"
                raise UserError(
                    f"adapter {adapter} was not made for {source!r}: its {name} is {list(shape)}, the model has {there}",
                    f"an adapter of this model (the adapter names {settings.get('base_model_name_or_path')!r} as its base)",
                    "load the base that the adapter was trained on",
                )


def _lora_side(module: nn.Module | None, part: str) -> tuple[int, int] | None:
    """(axis, size) that a LoRA matrix must have to fit a linear module; None where nothing is known."""
    if not isinstance(module, nn.Linear):
        return None
    return (1, module.in_features) if part.startswith("A.") else (0, module.out_features) if part.startswith("B.") else None


def _inject(hf: Any, adapter: Path) -> None:
    """Puts a PEFT adapter's layers into the model, which stays the class it is, so that hooks and the bridge see its blocks."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        inject_adapter_in_model(config, hf)
        result: Any = set_peft_model_state_dict(hf, load_file(adapter / "adapter_model.safetensors"))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter {adapter} could not be put into the model: {_first_line(error)}", "an adapter of this model"
        ) from error
    if result.unexpected_keys:
        raise UserError(
            f"adapter {adapter} has tensors that the model has no place for, such as {result.unexpected_keys[0]}",
            "an adapter of this model",
        )


def _defaults(folder: Path | None) -> dict[str, Any]:
    path = folder / "pvsae.json" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", "an object of defaults, or no such file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}", "an object of defaults")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
