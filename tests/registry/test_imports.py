"""Looking things up needs neither torch nor transformers, so `neft registry list` starts at once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from registry import Registry

registry = Registry.open(sys.argv[1])
(entry,) = registry.list()
assert registry.get("sst2") == registry.find(entry.input_digest) == registry.chain(entry)[0] == entry
site = registry.capacity(entry)[0].site
assert registry.search("task = 'sst2'", order_by=["created"]).entries == (entry,)
assert registry.tasks()[0].newest == registry.owners(site)[0].entry == registry.lineage(entry).entry == "sst2@1"
assert registry.overlap(entry, entry).iou == 1 and not registry.diff(entry, entry).fields
assert registry.overlaps("demo").sizes == (entry.neuron_count,) and not registry.nearest(entry)
heavy = {"torch", "transformers", "peft", "mlflow", "prefect", "flows"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""


def test_looking_up_imports_nothing_heavy(folder, pupil):
    pupil.record("sst2")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
