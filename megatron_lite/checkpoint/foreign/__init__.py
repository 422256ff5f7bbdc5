"""Checkpoints of other training systems, read without them: Megatron-LM's torch_dist, DeepSpeed's universal.

`pickles` reads what is pickled without running it, `torch_dist` and `universal` are the containers, `names` and
`arguments` say what parameters and settings are in ours, `convert` writes.
"""

from megatron_lite.checkpoint.foreign.convert import Imported, find_foreign, import_foreign

__all__ = ["Imported", "find_foreign", "import_foreign"]
