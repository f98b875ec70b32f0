"""The record of the race's rules: what has run with other settings is dropped, and nothing else."""

import json

from experiments import race_rules


def test_a_changed_rule_drops_its_own_entries_alone(monkeypatch, tmp_path):
    path = tmp_path / "race.json"
    monkeypatch.setattr(race_rules, "RESULT", path)
    assert race_rules.recorded()["trials"] == {}
    names = [race_rules.CHALLENGER, race_rules.FALLBACK, "kept", "changed", "gone"]
    trials = {
        "late": {"title": "a", "steps": 2000, "contenders": {name: {} for name in names}},
        "text": {"title": "b", "steps": 7, "contenders": {name: {} for name in names}},
    }
    old = {"kept": {}, "changed": {"n_t": 5}, "gone": {}}
    path.write_text(json.dumps({"seeds": race_rules.SEEDS, "rules": old, "trials": trials}))
    rules = {"kept": {}, "changed": {"n_t": 6}, "new": {"overrule": 1.0}}
    monkeypatch.setattr(race_rules, "RULES", rules)
    record = race_rules.recorded()
    assert record["rules"] == rules and record["trials"].keys() == {"late"}
    assert list(record["trials"]["late"]["contenders"]) == names[:3]
    path.write_text(json.dumps({"seeds": 1, "rules": old, "trials": trials}))
    assert race_rules.recorded()["trials"] == {}
