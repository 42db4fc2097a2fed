"""Export: fuse a base and an identity into constants, write graphs, check them, pack a plan."""

from .build import export_plan as export_plan
