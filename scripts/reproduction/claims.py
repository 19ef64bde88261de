"""What the talk claims, and our own questions: plain data.

Source of the claims: Fang et al., "An In-depth Study of Stochastic Backpropagation" (NeurIPS 2022), and its slides.
A comparison sets two arms of arms.py side by side; a claim is decided by its comparisons.
"""

from dataclasses import dataclass

from scripts.reproduction.arms import exists
from scripts.reproduction.settings import Setting

STAGES = {"early": 0.1, "middle": 0.5, "late": 1.0}  # of training: the checkpoints on which gradients are compared


@dataclass(frozen=True)
class Comparison:
    """`better` is claimed to be better than `worse`: a lower "val_loss", or a higher gradient "cosine"."""

    better: str
    worse: str
    measure: str = "val_loss"


@dataclass(frozen=True)
class Claim:
    """comparisons: decide it. dominated_by: arms, of which none may be as lean, as fast and better than "sbp".

    context: arms that are shown beside those. published: what the talk says. shows: its figure, "differences" of pairs,
    "similarities" along training, "costs", that is loss against memory and time, or "choice".
    against_plain: arms whose accuracy is set beside that of training without SBP, the most telling first.
    fine_tuning: it is of the settings that start from trained weights, and of no others.
    """

    title: str
    published: str
    comparisons: tuple[Comparison, ...] = ()
    dominated_by: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    shows: str = "differences"
    against_plain: tuple[str, ...] = ()
    fine_tuning: bool = False


def both(better: str, *worse: str) -> tuple[Comparison, ...]:
    """In loss and in similarity, against each."""
    return tuple(Comparison(better, other, measure) for other in worse for measure in ("val_loss", "cosine"))


CLAIMS = {
    "1": Claim(
        "The gradient of the kept positions is highly correlated with the whole gradient",
        "“We observe that dW_keep (SBP) are highly correlated (measured by cosine similarity) with dW (SGD).” "
        "How high is not said; here it counts as high when it is nearer than the gradient of half of the batch.",
        (Comparison("sbp", "half", "cosine"),),
        shows="similarities",
    ),
    "2": Claim(
        "Grid masks beat random ones",
        "“Grid-wise mask has higher accuracy”, “Grid-wise mask has stronger correlation”.",
        both("sbp", "random"),
    ),
    "3": Claim(
        "Keep-ratio 0.5 is the sweet spot",
        "“Sweet spot at keep-ratio = 0.5”: here, that no other ratio and no other way to save memory is at least as "
        "lean, at least as fast and better.",
        dominated_by=(
            "ratio_0.125",
            "ratio_0.25",
            "ratio_0.75",
            "plain",
            "cheap",
            "accumulation",
            "patch_dropout",
            "low_resolution",
            "low_throughout",
            "shorter",
        ),
        shows="costs",
    ),
    "4": Claim(
        "Uniform keep-ratios beat ratios that change with depth",
        "“Uniform keep-ratios method has best accuracy and correlation”.",
        both("sbp", "rising", "falling"),
    ),
    "5": Claim(
        "On MHSA, dropping on QKV beats dropping on queries and on heads",
        "“Dropping gradients on all QKV has best accuracy and correlation”.",
        both("sbp", "query", "head"),
        context=("qkv_exact",),
    ),
    "6": Claim(
        "The published choice of layers is the one to take",
        "Not a claim of the talk but its setting: SBP in the last two thirds of a ViT's blocks, and in the first two "
        "thirds or three quarters of a ConvNeXt's layers. Here against SBP in all layers, and in as many at the "
        "network's other end.",
        both("sbp", "layers_all", "layers_other"),
    ),
    "7": Claim(
        "Table 1: less memory, and 0.5 to 0.6 points less top-1",
        "“SBP can save up to 40% of GPU memory with 0.6% of accuracy drop”.",
    ),
}

QUESTIONS = {  # ours, answered in the same way
    "exact_attention": Claim(
        "Is `qkv_exact`, whose forward pass is the plain model's, better than `qkv`?",
        "Not in the talk.",
        (*both("qkv_exact", "sbp"), Comparison("partial", "sbp")),
    ),
    "masks": Claim(
        "Are there better masks than a fresh one for each step and all of its images?",
        "Not in the talk; published is a fresh mask for each step, the same for every image.",
        (
            Comparison("per_sample", "sbp"),
            Comparison("per_half", "sbp"),
            Comparison("sbp", "fixed"),
            Comparison("per_sample", "sbp", "cosine"),
            Comparison("per_half", "sbp", "cosine"),
            Comparison("input_per_sample", "input"),
        ),
    ),
    "gradients": Claim(
        "Does it help to rescale the gradients of the branches, or to back-propagate in full or more at the end?",
        "Not in the talk.",
        (
            Comparison("rescale", "sbp"),
            Comparison("rescale", "sbp", "cosine"),
            Comparison("exact_end", "sbp"),
            Comparison("exact_end_20", "sbp"),
            Comparison("rising_epochs", "sbp"),
        ),
    ),
    "alternatives": Claim(
        "At the same memory or the same time, is SBP better than what else one could do?",
        "Not in the talk.",
        (
            *(Comparison("sbp", other) for other in ("patch_dropout", "low_resolution", "low_throughout", "shorter")),
            Comparison("longer", "plain"),
        ),
        context=("cheap", "accumulation", "sbp_cheap"),
        shows="costs",
    ),
    "better": Claim(
        "Is there a setting that loses less than the published one, in about its memory and time?",
        "Not in the talk. What was most promising before the runs: input gradients at dropped positions in a ConvNeXt, "
        "and attention that drops queries alone in a ViT, each at half of the published keep-ratio.",
        (Comparison("input_0.25", "sbp"), Comparison("query_0.25", "sbp")),
        context=("sbp_cheap",),
        shows="choice",
    ),
    "choice": Claim(
        "Which setting loses least for the memory and the time that one has?",
        "Not in the talk.",
        context=("cheap", "block", "sbp_cheap", "sbp_block"),
        shows="choice",
        against_plain=(
            "sbp",
            "query",
            "query_0.25",
            "ratio_0.25",
            "ratio_0.75",
            "shorter",
            "longer",
            "qkv_exact",
            "patch_dropout",
            "query_0.125",
            "query_0.0625",
            "low_resolution",
            "input",
            "input_0.25",
            "input_0.125",
            "query_input_0.25",
        ),
    ),
    "input_gradients": Claim(
        "Does it help to pass on the gradient of a branch's input at dropped positions?",
        "Not in the talk; there dropped positions have no gradient in a branch, neither of weights nor of its input.",
        (Comparison("input", "sbp"), Comparison("query_input_0.25", "query_0.25")),
        against_plain=("sbp", "input_0.25", "query_0.25", "ratio_0.25", "input", "query_input_0.25"),
        shows="choice",
    ),
    "neighbours": Claim(
        "Does it help to lend dropped positions the gradients of their neighbours?",
        "Not in the talk. Found after the runs with input gradients had shown what is missing: the mean of the kept "
        "positions around costs neither memory nor matrix products.",
        both("neighbours", "sbp"),
        against_plain=("neighbours", "sbp", "neighbours_0.25", "ratio_0.25"),
        shows="choice",
    ),
    "fine_tuning": Claim(
        "In fine-tuning, what does SBP lose beside exact backpropagation and a frozen backbone?",
        "Not in the talk.",
        context=("cheap", "sbp_cheap"),
        against_plain=("sbp", "frozen", "query", "query_0.25", "input_0.25", "ratio_0.25"),
        shows="choice",
        fine_tuning=True,
    ),
    "learning_rate": Claim(
        "Does SBP want another learning rate than exact training?",
        "Not in the talk, which trains both at the same.",
        (
            Comparison("plain_lr_half", "plain"),
            Comparison("plain_lr_double", "plain"),
            Comparison("sbp_lr_half", "sbp"),
            Comparison("sbp_lr_double", "sbp"),
        ),
    ),
}

ANSWERED = CLAIMS | QUESTIONS


def asks_of(claim: Claim, setting: Setting) -> bool:
    """Whether the claim says anything of such a setting: one of fine-tuning of that alone, the others of the others."""
    return claim.fine_tuning == (setting.starts_from is not None) and not setting.plain_only


def arms_of(claims: list[Claim], setting: Setting) -> list[str]:
    """The arms that the claims need, "plain" and "sbp" first."""
    if setting.gradients_only or setting.plain_only:
        return ["plain"]
    claims = [claim for claim in claims if asks_of(claim, setting)]
    compares = any(claim.comparisons or claim.dominated_by or claim.against_plain for claim in claims)
    named = ["plain", "sbp"] if compares else []
    for claim in claims:
        named += claim.against_plain
        named += [arm for one in claim.comparisons for arm in (one.better, one.worse)]
        named += [*claim.dominated_by, *claim.context]
    return [arm for arm in dict.fromkeys(named) if exists(arm, setting)]


def gradients_of(claims: list[Claim], setting: Setting) -> list[str]:
    """The arms whose gradients are compared with the exact ones, and "nulls".

    And "own": those of SBP on weights that were trained with it, not on those of plain training.
    """
    claims = [claim for claim in claims if asks_of(claim, setting)]
    compared = [one for claim in claims for one in claim.comparisons if one.measure == "cosine"]
    arms = dict.fromkeys(arm for one in compared for arm in ("sbp", one.better, one.worse))
    own = any(claim.shows == "similarities" for claim in claims) and not setting.gradients_only
    return [*(["nulls"] if arms else []), *(["own"] if own else []), *(arm for arm in arms if exists(arm, setting))]
