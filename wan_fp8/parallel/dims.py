"""How ranks share a forward, as numbers; and the process groups that follow from them.

A rank's number is read as (cfg, ring, ulysses), the last one fastest: ranks that exchange most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import InputError
from ..models.specs import ModelSpec

RING_AND_SPARSE = (
    "sparse attention chooses blocks among all queries and keys of a head, which a ring splits: use ulysses alone, or "
    "turn sparsity off"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDims:
    """``cfg`` x ``ring`` x ``ulysses`` ranks serve one forward.

    Raises:
        InputError: numbers that do not make a layout.
    """

    cfg: int = 1
    """2: the conditional and the unconditional half of a batch on different ranks."""
    ulysses: int = 1
    """Ranks that split the tokens, and trade them for heads around self-attention."""
    ring: int = 1
    """Ranks (groups of ``ulysses``) that split the queries, and gather keys and values."""
    shard: int = 1
    """Ranks that hold each block's weights together (FSDP2); 1: every rank holds all of them. Fewer than all ranks:
    sharded inside groups of neighbours, replicated across them (HSDP)."""

    merge: bool = False
    """With ``ring``: pass keys and values around and merge partial softmaxes, in place of gathering them."""

    def __post_init__(self) -> None:
        for name in ("cfg", "ulysses", "ring", "shard"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} counts ranks from 1; got {value!r}")
        if self.cfg > 2:
            raise InputError(f"cfg is 1 or 2, guidance has two halves; got {self.cfg}")
        if self.merge and self.ring == 1:
            raise InputError("merge says how keys go around a ring, and ring is 1: leave merge out")
        if self.world % self.shard:
            raise InputError(f"shard must divide the {self.world} ranks of cfg x ulysses x ring; got {self.shard}")

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.cfg * self.sequence

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one sequence."""
        return self.ulysses * self.ring

    @property
    def sparse_refusal(self) -> str | None:
        """Why attention cannot be sparse in this layout; None where it can."""
        return RING_AND_SPARSE if self.ring > 1 else None

    def __str__(self) -> str:
        weights = "replicated" if self.shard == 1 else f"sharded over {self.shard}"
        around = ", keys passed around" if self.merge else ""
        return f"cfg {self.cfg} x ulysses {self.ulysses} x ring {self.ring}{around}, weights {weights}"

    def check(self, spec: ModelSpec) -> None:
        """
        Raises:
            InputError: a model with ``spec`` cannot be laid out like this.
        """
        if spec.num_heads % self.ulysses:
            raise InputError(
                f"ulysses {self.ulysses} does not divide the {spec.num_heads} heads of the model: take a divisor, and "
                "the rest of the ranks as ring"
            )


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups of this rank, and its place in them."""

    dims: ParallelDims
    everyone: dist.ProcessGroup
    cfg: dist.ProcessGroup
    """Ranks with the same tokens of the other conditionings."""
    sequence: dist.ProcessGroup
    """Ranks with the other tokens of the same conditionings, in token order."""
    ring: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    weights: DeviceMesh
    """(replicate, shard)."""
    cfg_rank: int
    sequence_rank: int


_built: dict[tuple[ParallelDims, str], Groups] = {}
"""Groups cost sockets and memory of the GPU: models with the same layout share them."""


def build_groups(dims: ParallelDims, device_type: str) -> Groups:
    """Groups on the process group that ``torch.distributed`` has; every rank must call this.

    Raises:
        InputError: there is none, or one of another size.
    """
    if not dist.is_initialized():
        raise InputError("there is no process group: call torch.distributed.init_process_group on every rank first")
    if dist.get_world_size() != dims.world:
        raise InputError(f"{dims} takes {dims.world} ranks; the process group has {dist.get_world_size()}")
    everyone = dist.group.WORLD
    assert everyone is not None
    known = _built.get((dims, device_type))
    if known is not None and known.everyone is everyone:
        return known
    halves = init_device_mesh(device_type, (dims.cfg, dims.sequence), mesh_dim_names=("cfg", "sequence"))
    inside = init_device_mesh(device_type, (dims.cfg, dims.ring, dims.ulysses), mesh_dim_names=("c", "ring", "ulysses"))
    weights = init_device_mesh(
        device_type, (dims.world // dims.shard, dims.shard), mesh_dim_names=("replicate", "shard")
    )
    groups = Groups(
        dims=dims,
        everyone=everyone,
        cfg=halves.get_group("cfg"),
        sequence=halves.get_group("sequence"),
        ring=inside.get_group("ring"),
        ulysses=inside.get_group("ulysses"),
        weights=weights,
        cfg_rank=halves.get_local_rank("cfg"),
        sequence_rank=halves.get_local_rank("sequence"),
    )
    _built[dims, device_type] = groups
    return groups
