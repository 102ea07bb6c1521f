"""Checkpoints on disk to the other form and back: Orbax, Flax msgpack, safetensors."""

from ..messages.errors import CheckpointError as CheckpointError
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import CheckpointInfo as CheckpointInfo
from .checkpoint import CheckpointReport as CheckpointReport
from .checkpoint import LeafInfo as LeafInfo
from .content import ContentReport as ContentReport
from .convert import convert_checkpoint as convert_checkpoint
from .convert import restore_checkpoint as restore_checkpoint
from .convert import verify_checkpoint as verify_checkpoint
from .files import inspect_checkpoint as inspect_checkpoint
from .files import open_checkpoint as open_checkpoint
from .files import read_checkpoint as read_checkpoint
from .places import check_target as check_target
