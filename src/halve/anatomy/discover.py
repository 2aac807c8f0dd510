"""What every weight of a model is made of, found from the model's own code.

The modeling code is the specification. The model is built on the meta device at several sizes. Each dimension of each
parameter is then solved for as a sum of products of axes. What shapes cannot show comes from `quirks.py`. If neither
gives an answer, the axis is refused. No result is used before `halve.cut.proof.prove` has proved it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halve.anatomy import caches, configs, kinds
from halve.anatomy.arch import Arch, Layer, Ledger, Shape, TokenCache
from halve.anatomy.axes import CUT_AXES, Expr
from halve.anatomy.quirks import COUPLED, MULTI_QUERY, Quirk, quirk
from halve.anatomy.solve import TWIN_POINT, alike, parse_shape, small, solve, solve_twin, tied_point
from halve.errors import AnatomyError, HalveError, PlanError

V = TypeVar("V")


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of. `discover` makes it; `halve.cut.proof.prove.prove` proves it on a random twin."""

    family: str
    config: PretrainedConfig
    sizes: Arch
    params: Mapping[str, Shape]
    """What each dimension of each parameter is made of, by state-dict name. A tied table is listed once."""
    layers_path: str
    coupled: bool
    """The code computes head_dim as hidden / heads: the two are cut together or not at all."""
    scaled_embedding: bool
    refusals: Mapping[str, str]
    """Axes that cannot be cut, each with its reason."""
    modules: Mapping[str, Expr]
    """Matrix-product modules (Linear, Conv1D) and what their input is made of."""
    norms: tuple[str, ...]
    """Modules that normalize over `hidden`, those without parameters too."""
    embeddings: tuple[str, ...]
    head: str
    """The parameter that makes logits; an entry of `embeddings`."""
    representatives: tuple[int, ...]
    """One layer of each kind (and a few more); the twin consists of these."""
    unknown: tuple[str, ...] = ()
    """Parameters made of no known axes. They count with their size, and axes that could change them are refused."""
    cache: tuple[TokenCache, ...] = ()
    """For every layer, what it caches for a token; empty if the code does not show it."""

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one parameter."""
        return self.head == self.embeddings[0]

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter or module belongs to; None outside the layers."""
        prefix = self.layers_path + "."
        return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None

    def in_layer(self, name: str, layer: int) -> str:
        """The same name in another layer. A name outside the layers is returned unchanged."""
        old = self.layer_of(name)
        if old is None:
            return name
        start = len(self.layers_path) + 1 + len(str(old))
        return f"{self.layers_path}.{layer}{name[start:]}"

    def readers(self, axis: str) -> tuple[tuple[str, ...], ...]:
        """For every layer, the modules whose input is made of this axis and no other.

        ffn: down projections; heads: output projections; hidden: what reads the residual stream, such as q, k, v,
        gate and up. Modules outside the layers (the output embedding) are left out.
        """
        names_by_layer: list[list[str]] = [[] for _ in range(self.sizes.layers)]
        for name, expr in self.modules.items():
            layer = self.layer_of(name)
            if layer is not None and axis in expr.axes and len(expr.terms) == 1:
                names_by_layer[layer].append(name)
        return tuple(tuple(names) for names in names_by_layer)

    @property
    def mixers(self) -> tuple[str, ...]:
        """Modules inside layers that read the residual stream with weights of their own: routers and experts."""
        holders: dict[str, None] = {}
        for name, shape in self.params.items():
            holder = name.rpartition(".")[0]
            if self.layer_of(holder) is None or holder in (*self.modules, *self.norms):
                continue
            # a router multiplies by its last dimension; of experts' weights, some have it last and some in the middle
            reading = shape[-1:] if len(shape) == 2 else shape[1:]
            if any("hidden" in expr.axes for expr in reading):
                holders[holder] = None
        return tuple(holders)

    @property
    def final_norm(self) -> str | None:
        """The norm between the last layer and the head."""
        outside = [name for name in self.norms if self.layer_of(name) is None]
        return outside[-1] if outside else None

    @cached_property
    def ledger(self) -> Ledger:
        """The data that counting needs."""
        matrices = {f"{name}.weight" for name in self.modules}
        experts = configs.num_experts(self.config)
        inside: list[list[str]] = [[] for _ in range(self.sizes.layers)]
        for name in self.params:
            if (layer := self.layer_of(name)) is not None:
                inside[layer].append(name)
        layers = [
            Layer.of(
                [self.params[n] for n in names],
                matrices=[self.params[n] for n in names if n in matrices and not _routed(n, self.params[n], experts)],
                experts=[self.params[n] for n in names if _routed(n, self.params[n], experts)],
                cache=self.cache[number] if self.cache else None,
            )
            for number, names in enumerate(inside)
        ]
        outside = [n for n in self.params if self.layer_of(n) is None and n not in self.embeddings]
        return Ledger(
            layers=tuple(layers),
            outside=tuple(self.params[n] for n in outside),
            embeddings=tuple(self.params[n] for n in self.embeddings),
            head=self.params[self.head],
            routed_share=configs.routed_share(self.config),
        )

    def twin(self, *, square: bool = False, own_heads: bool = False) -> Anatomy:
        """The anatomy of a tiny model of the same architecture, with the expressions of this one.

        Its config keeps every option of this one. Sizes and windows are small, experts are few, and layers are the
        representatives. `square` sets hidden = heads x head_dim even if the code allows others. `own_heads` keeps the
        width of the family's own heads.
        """
        point = dict(TWIN_POINT)
        if own_heads:
            point["head_dim"] = self.sizes.head_dim
        point = tied_point(point, coupled=self.coupled or square)
        if not configs.has_heads(self.config):
            point |= {"heads": 1, "kv_heads": 1, "head_dim": point["hidden"]}
        if not self.grouped:
            point["kv_heads"] = point["heads"]
        shrink, params = solve_twin(
            self.config, self.representatives, self.layers_path, self._represented(self.params), coupled=self.coupled
        )
        config = small(self.config, point, self.representatives, shrink=shrink)
        if self.multi_query:
            point["kv_heads"] = 1

        def rename(name: str) -> str:
            layer = self.layer_of(name)
            return name if layer is None else self.in_layer(name, self.representatives.index(layer))

        return replace(
            self,
            config=config,
            sizes=Arch.of({**point, "layers": len(self.representatives)}),
            params={rename(name): shape for name, shape in params.items()} | self._as_built(config, rename),
            unknown=tuple(rename(name) for name in self._represented(dict.fromkeys(self.unknown))),
            cache=tuple(self.cache[layer] for layer in self.representatives) if self.cache else (),
            modules={rename(name): expr for name, expr in self._represented(self.modules).items()},
            norms=tuple(rename(name) for name in self._represented(dict.fromkeys(self.norms))),
            representatives=tuple(range(len(self.representatives))),
        )

    def _as_built(self, config: PretrainedConfig, rename: Callable[[str], str]) -> dict[str, Shape]:
        """The sizes in a twin of this config of the parameters that are unknown here."""
        unknown = {rename(name) for name in self._represented(dict.fromkeys(self.unknown))}
        if not unknown:
            return {}
        model = configs.build(config, device="meta")
        return {name: _as_it_is(value) for name, value in model.named_parameters() if name in unknown}

    def _represented(self, named: Mapping[str, V]) -> dict[str, V]:
        layers = (None, *self.representatives)
        return {name: value for name, value in named.items() if self.layer_of(name) in layers}

    @property
    def grouped(self) -> bool:
        """Whether key-value heads are a separate axis, that is whether some weight is made of them."""
        return any("kv_heads" in expr.axes for shape in self.params.values() for expr in shape)

    @property
    def multi_query(self) -> bool:
        """Whether the code has one key-value head for all query heads, even if the config names more groups."""
        return self.sizes.kv_heads == 1 < self.sizes.heads and not self.grouped


def discover(config: PretrainedConfig) -> Anatomy:
    """Find the anatomy of the model that this config describes, on the meta device, in seconds.

    A process analyzes equal configs once. Raises `AnatomyError` for a config that is not a decoder-only language model.
    """
    key = (type(config), repr(config.to_dict()))
    if key not in _found:
        _found[key] = _looked_at(copy.deepcopy(config))
    return replace(_found[key], config=config)


_found: dict[tuple[type, str], Anatomy] = {}


def _looked_at(config: PretrainedConfig) -> Anatomy:
    try:
        with configs.quiet():
            return _discover(config)
    except HalveError:
        raise
    except Exception as error:  # the family's own code may raise anything at sizes that it was not written for
        raise AnatomyError(
            f"cannot find out what {config.model_type} is made of",
            why=f"{type(error).__name__}: {error}",
            fix="this family's code does not build at other sizes; it can be supported in anatomy/quirks.py",
        ) from error


def _discover(config: PretrainedConfig) -> Anatomy:
    configs.require_text(config)
    sizes = configs.sizes(config)
    model = configs.build(config, device="meta")
    layers_path = kinds.find_layers(model, configs.num_layers(config))
    firsts = kinds.firsts(model, config, layers_path)
    representatives = kinds.representatives(firsts)
    special = quirk(config.model_type)
    try:
        coupled, exprs = solve(config, representatives, layers_path, coupled=special.coupled)
        rigid = ""
    except (AnatomyError, PlanError) as error:  # counted with its current size, and not cut
        coupled, exprs, rigid = False, {}, f"its code builds at no other sizes: {error.why}"
    kinds_of_layers = sorted(set(firsts))
    cached = caches.cached(config, kinds_of_layers)
    if coupled:  # whatever the config says beside
        sizes = sizes.at(head_dim=sizes.hidden // sizes.heads)
    sizes = caches.heads_as_cached(sizes, exprs, cached or ())
    exprs_of = caches.cache_exprs(config, kinds_of_layers, cached, sizes, coupled=coupled) if cached else []
    params: dict[str, Shape] = {}
    unknown = []
    for name, parameter in model.named_parameters():
        shape = _shape_of(name, parameter, exprs, firsts, layers_path, coupled, special)
        if shape is None or tuple(expr.size(sizes.sizes) for expr in shape) != tuple(parameter.shape):
            shape = _as_it_is(parameter)
            unknown.append(name)
        params[name] = shape
    head = _name_of(model, model.get_output_embeddings().weight) if model.get_output_embeddings() else ""
    anatomy = Anatomy(
        family=config.model_type,
        config=config,
        sizes=sizes,
        params=params,
        layers_path=layers_path,
        coupled=coupled,
        scaled_embedding=special.scaled_embedding,
        refusals={},
        modules=_modules(model, params),
        norms=_norms(model, params, sizes),
        embeddings=_embeddings(model, head),
        head=head,
        representatives=representatives,
        unknown=tuple(unknown),
        cache=tuple(exprs_of[kinds_of_layers.index(first)] for first in firsts) if exprs_of else (),
    )
    _verify(anatomy, model)
    refusals = _refusals(anatomy)
    if rigid:
        refusals |= dict.fromkeys(CUT_AXES, rigid)
    elif (reason := kinds.fixed(kinds.kinds(model.get_submodule(layers_path)), config, layers_path)) is not None:
        refusals["layers"] = reason
    return replace(anatomy, refusals=refusals)


# ---- from the representatives to the whole model


def _shape_of(
    name: str,
    parameter: torch.Tensor,
    exprs: Mapping[str, Shape | None],
    firsts: list[int],
    layers_path: str,
    coupled: bool,
    special: Quirk,
) -> Shape | None:
    for suffix, layout in special.layout.items():
        if name.endswith("." + suffix):
            return parse_shape(layout)
    prefix = layers_path + "."
    if name.startswith(prefix):
        number, rest = name[len(prefix) :].split(".", 1)
        name = f"{prefix}{firsts[int(number)]}.{rest}"
    shape = exprs.get(name)
    if shape is None or len(shape) != parameter.ndim:
        return None
    for suffix, layout in (*COUPLED.items(), *MULTI_QUERY.items()) if coupled else ():
        if name.endswith("." + suffix) and alike(guess := parse_shape(layout), shape):
            return guess
    return shape


def _as_it_is(parameter: torch.Tensor) -> Shape:
    return tuple(Expr(((length,),)) for length in parameter.shape)


def _verify(anatomy: Anatomy, model: PreTrainedModel) -> None:
    """Require that the count is complete: it must equal that of the model itself."""
    counted, built = anatomy.ledger.count(anatomy.sizes).params, sum(p.numel() for p in model.parameters())
    if counted != built:
        raise AnatomyError(
            f"cannot count the parameters of {anatomy.family}",
            why=f"its weights have {built:,} entries, the anatomy {counted:,}",
            fix="add what is special to the family in anatomy/quirks.py",
        )


def _routed(name: str, shape: Shape, experts: int) -> bool:
    """Whether a parameter belongs to routed experts, of which each token uses only a few."""
    stacked = len(shape) == 3 and shape[0] == Expr(((experts,),))
    return bool(experts) and (stacked or "experts" in name.split("."))


def _name_of(model: nn.Module, wanted: torch.Tensor) -> str:
    return next(str(name) for name, parameter in model.named_parameters() if parameter is wanted)


def _modules(model: nn.Module, params: Mapping[str, Shape]) -> dict[str, Expr]:
    exprs = {}
    for name, module in model.named_modules():
        shape = params.get(f"{name}.weight")
        if shape is not None and isinstance(module, nn.Linear | Conv1D):
            exprs[name] = shape[0] if isinstance(module, Conv1D) else shape[1]
    return exprs


def _norms(model: nn.Module, params: Mapping[str, Shape], sizes: Arch) -> tuple[str, ...]:
    hidden = (Expr.parse("hidden"),)
    norms = []
    for name, module in model.named_modules():
        parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        free = not parameters and "norm" in type(module).__name__.lower()
        if parameters and not any(module.children()):
            if all(params.get(parameter) == hidden for parameter in parameters):
                norms.append(name)
        elif free and tuple(getattr(module, "normalized_shape", ())) == (sizes.hidden,):
            norms.append(name)
    return tuple(norms)


def _embeddings(model: PreTrainedModel, head: str) -> tuple[str, ...]:
    tables = [_name_of(model, model.get_input_embeddings().weight)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and f"{name}.weight" not in tables:
            tables.append(f"{name}.weight")
    return tuple(tables) if head in tables else (*tables, head)


# ---- what cannot be cut, and why


def _refusals(anatomy: Anatomy) -> dict[str, str]:
    made_of = {axis for shape in anatomy.params.values() for expr in shape for axis in expr.axes}
    refusals = {
        "head_dim": "halve never cuts it: rotary embeddings pair its channels",
        "vocab": "halve never cuts it: the tokenizer stays unchanged",
        "experts": "experts are not cut yet",
        "expert_ffn": "experts are not cut yet",
    }
    if experts := configs.num_experts(anatomy.config):
        mixture = f"a mixture of {experts} experts: "
        in_experts = {
            axis for shape in anatomy.params.values() if len(shape) == 3 for expr in shape for axis in expr.axes
        }
        if "ffn" in in_experts or "ffn" not in made_of:
            refusals["ffn"] = mixture + "their neurons are not cut yet"
    for axis in ("ffn", "heads", "hidden"):
        if axis not in made_of and axis not in refusals:
            refusals[axis] = f"no weight is made of {axis} alone, as far as shapes can tell"
    if anatomy.coupled and "heads" not in made_of:
        for axis in ("heads", "hidden"):
            refusals[axis] = "hidden = heads x head_dim in this family's code, and shapes cannot tell the two apart"
    if not anatomy.grouped:
        refusals["kv_heads"] = "every query head has its own key and value head: cut heads"
    if anatomy.sizes.kv_heads == 1 and anatomy.sizes.heads > 1:
        refusals["kv_heads"] = "all query heads share one key and value head, so none can be removed"
    if not configs.has_heads(anatomy.config):
        refusals |= dict.fromkeys(("heads", "kv_heads"), "the config counts no heads of attention")
    if anatomy.unknown:
        for axis in ("hidden", "ffn", "heads", "kv_heads"):
            refusals.setdefault(axis, f"{anatomy.unknown[0]} has a dimension that is no sum of products of known axes")
    return refusals
