"""What the probes cost that every transfer has: see docs/performance.md."""
import json, os, subprocess

from writing import BLOCKS

ACT, PARTS = 'One act that is counted', 'Part of the time that probes take'
MOST = 1  # percent


class Probes:
    def __init__(self, bench, writing):
        self.bench, self.writing = bench, writing

    def run(self):
        for _ in range(self.bench.args.rounds):
            found = json.loads(subprocess.check_output([self.bench.args.programs / 'examples' / 'probes']))
            self.add(ACT, 'ns', 'with bytes', found['actNanoseconds'])
            self.add(ACT, 'ns', 'as small as a rename', found['smallActNanoseconds'])
            # Nothing does less with a block than an ingest without compression into memory, and a merge that renames it.
            self.add(PARTS, '%', 'ingest into memory', 100 * found['ingestPart'])
            with self.writing.pair('exploded', BLOCKS) as folder:
                seconds = self.writing.merge(folder) * len(os.sched_getaffinity(0))
            self.add(PARTS, '%', 'merge by rename', 100 * BLOCKS * found['smallActNanoseconds'] / 1e9 / seconds)
        for test in (ACT, PARTS):
            self.bench.report.print_test('probes', test)

    def add(self, test, unit, target, value):
        self.bench.add('probes', test, unit, target, value, False)

    def goals(self):
        """The probes may take 1 %: what is left of the time is compared with 99 %."""
        medians = [(name, self.bench.report.median('probes', PARTS, name)) for name in ('ingest into memory', 'merge by rename')]
        return [(f'What probes leave of the time, {name}, %', 100 - MOST, 100 - part) for name, part in medians if part is not None]
