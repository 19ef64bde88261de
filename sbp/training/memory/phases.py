"""The phases of a run, in each of which all steps are alike: SBP, then exact epochs."""

from dataclasses import replace

from sbp.training.config.run import Config

EXACT = "exact epochs"


def phases(config: Config) -> dict[str, Config]:
    """By name, in their order, a config all of whose steps are those of the phase; of a run of one kind itself."""
    sbp = config.sbp
    if not sbp.enabled or not sbp.exact_epochs:
        return {"all epochs": config}
    alike = replace(sbp, exact_epochs=0, exact_recompute=None)
    # What concerns masks alone is as by default, so that runs whose exact epochs are alike have the same config here.
    again = sbp.recompute if sbp.exact_recompute is None else sbp.exact_recompute
    exact = replace(alike, keep_ratio=1.0, recompute=again, mhsa_drop="qkv", dropped="none")
    found = {"SBP": replace(config, sbp=alike), EXACT: replace(config, sbp=exact)}
    return found if sbp.exact_epochs < config.recipe.epochs else {EXACT: found[EXACT]}
