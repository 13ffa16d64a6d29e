"""Dynamic counts of one launch."""
import csv
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """Executed instructions by class, over all threads; send: messages; other: all the rest."""
    dpas: int
    send: int
    sync: int
    other: int

    @property
    def other_per_dpas(self):
        """(all instructions but dpas) / dpas; None without dpas."""
        return (self.send + self.sync + self.other) / self.dpas if self.dpas else None


class Stats:
    """Dynamic counts of one launch.

    total: instructions of all threads; counts: by class (Counts); macs: multiply-adds of dpas; per_op, per_class: Counters.
    sends, send_class: message or class of messages -> [count, bytes]; threads: (threads, 4) array of instructions, dpas, sends, 0.
    warnings: restriction of a message that was violated -> how often; seconds: of this machine.
    """
    def __init__(self, kernel, inst, threads, total, seconds, warnings, groups):
        self.kernel, self.total, self.seconds, self.warnings = kernel, total, seconds, warnings
        self.inst = inst                       # per instruction: count, lanes, bytes
        self.threads = threads
        self.groups = groups
        self.per_op, self.per_class = Counter(), Counter()
        self.sends = defaultdict(lambda: [0, 0])
        self.send_class = defaultdict(lambda: [0, 0])
        self.macs = 0
        for ins, (count, _, nbytes) in zip(kernel.ins, inst.tolist()):
            if not count:
                continue
            self.per_op[ins.opcode] += count
            self.per_class[ins.kind] += count
            self.macs += count * ins.macs
            if ins.kind == "send":
                for table, key in ((self.send_class, ins.message_class), (self.sends, ins.message)):
                    table[key][0] += count
                    table[key][1] += nbytes
        dpas, send, sync = (self.per_class[k] for k in ("dpas", "send", "sync"))
        self.counts = Counts(dpas, send, sync, total - dpas - send - sync)

    @property
    def dpas(self):
        return self.counts.dpas

    def as_dict(self):
        t = self.threads[:, 0]
        return {"kernel": self.kernel.name, "instructions": self.total, "seconds": self.seconds, "groups": self.groups,
                "threads": len(t), "per_thread": {"min": int(t.min()), "mean": float(t.mean()), "max": int(t.max())},
                "counts": self.counts._asdict(), "macs": self.macs, "per_class": dict(self.per_class), "per_op": dict(self.per_op.most_common()),
                "send_class": {k: {"count": c, "bytes": b} for k, (c, b) in sorted(self.send_class.items())},
                "sends": {k: {"count": c, "bytes": b} for k, (c, b) in sorted(self.sends.items())}, "warnings": self.warnings}

    def json(self, path=None):
        s = json.dumps(self.as_dict(), indent=1)
        if path:
            Path(path).write_text(s)
        return s

    def csv(self, path):
        """One row an opcode, one a kind of message."""
        with open(path, "w", newline="") as f:
            w = csv.writer(f)
            w.writerow(["what", "name", "count", "bytes"])
            for k, v in self.per_op.most_common():
                w.writerow(["op", k, v, ""])
            for k, (c, b) in sorted(self.sends.items()):
                w.writerow(["send", k, c, b])

    def threads_csv(self, path):
        np.savetxt(path, self.threads[:, :3], fmt="%d", delimiter=",", header="instructions,dpas,sends", comments="")

    def profile(self, min_count=0):
        """The listing with offset, number of executions, mean active lanes and bytes before every instruction."""
        out = []
        for ins, (count, lanes, nbytes) in zip(self.kernel.ins, self.inst.tolist()):
            if count >= min_count:
                out.append(f"{ins.address - self.kernel.ins[0].address:7d} {count:10d} {lanes / count if count else 0:5.1f} {nbytes or '':>10} {ins.text}")
        return "\n".join(out)

    def __repr__(self):
        s = ", ".join(f"{k} {c} ({b} B)" for k, (c, b) in sorted(self.send_class.items()))
        return (f"<{self.kernel.name}: {self.total} instructions in {self.seconds:.3f} s "
                f"({self.total / max(self.seconds, 1e-9) / 1e6:.1f} M/s), {self.counts}, MACs {self.macs}; {s}>")
