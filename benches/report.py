"""What was measured: kept, printed as tables, and compared with the goals."""
import json, statistics


class Report:
    """Results by group, test and target: a list of figures each, of one unit per test."""

    def __init__(self):
        self.tests = {}

    def add(self, group, test, unit, target, value, is_speed=True):
        entry = self.tests.setdefault((group, test), {'unit': unit, 'is_speed': is_speed, 'targets': {}})
        entry['targets'].setdefault(target, []).append(value)

    def median(self, group, test, target):
        values = self.tests.get((group, test), {'targets': {}})['targets'].get(target)
        return statistics.median(values) if values else None

    def ratio(self, group, test, target, base, base_test=None):
        """How many times as much of the one as of the other; None if either was not measured."""
        ours, theirs = self.median(group, test, target), self.median(group, base_test or test, base)
        return ours / theirs if ours is not None and theirs else None

    def pairs(self, group, test, target, base):
        """The ratio of each round: of what drifts, two that follow each other have the same."""
        values = self.tests.get((group, test), {'targets': {}})['targets']
        return [ours / theirs for ours, theirs in zip(values.get(target, []), values.get(base, []))]

    def paired(self, group, test, target, base):
        pairs = self.pairs(group, test, target, base)
        return statistics.median(pairs) if pairs else None

    def print_test(self, group, test):
        entry = self.tests[group, test]
        targets, unit = entry['targets'], entry['unit']
        bases = [base for base in ('plain', 'qemu', 'nbdcopy') if base in targets and len(targets) > 1]
        rounds = max(len(values) for values in targets.values())
        print(f'\n### {test}\n\n{unit}, median of {rounds} (lowest to highest)'
              + ('; ratios are of speed' if bases and not entry['is_speed'] else '') + '\n')
        print(f'| target | {unit} | spread |' + ''.join(f' of {base} |' for base in bases))
        print('|---|---:|---:|' + '---:|' * len(bases))
        for target, values in targets.items():
            median = statistics.median(values)
            line = f'| {target} | {figure(median)} | {figure(min(values))} to {figure(max(values))} |'
            for base in bases:
                ratio = self.ratio(group, test, target, base)
                if not entry['is_speed'] and ratio:
                    ratio = 1 / ratio
                line += f' {ratio:.2f} |' if ratio is not None else ' |'
            print(line, flush=True)

    def print_pairs(self, group, test, target, base):
        pairs = self.pairs(group, test, target, base)
        print(f'\n{target} of {base}, round by round: {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})', flush=True)

    def print_goals(self, goals):
        """Goals are (what, least, ratio or None); those not measured are left out."""
        rows = [(what, least, found) for what, least, found in goals if found is not None]
        if rows:
            print('\n## Goals\n\n| goal | at least | measured | |\n|---|---:|---:|---|')
        for what, least, found in rows:
            print(f'| {what} | {figure(least)} | {figure(found)} | {"met" if found >= least else "missed"} |')

    def write(self, path):
        tests = [{'group': group, 'test': test, **entry} for (group, test), entry in self.tests.items()]
        with open(path, 'w') as out:
            json.dump(tests, out, indent=1)


def figure(value):
    """Three digits, or all before the point."""
    if value >= 100 or value == int(value):
        return f'{value:,.0f}'
    return f'{value:.1f}' if value >= 10 else f'{value:.2f}' if value >= 0.1 else f'{value:.4f}'
