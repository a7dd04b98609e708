"""An explanation of each metric, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping

MEANINGS = {
    "accuracy": "Share that is right: top class, next token, node, or order of two candidates. 1 is perfect.",
    "nll": "Mean negative log-likelihood of the labels, in nats. Lower is better.",
    "ece": "Expected calibration error: mean gap between confidence and accuracy over 15 bins. 0 is perfect.",
    "bits_per_byte": "Negative log-likelihood in bits for each byte of text; comparable between tokenizers. Lower is better.",
    "agreement": "Share of rows (or pairs, for rankings) where student and teacher choose alike. 1 is a perfect copy.",
    "kl": "Mean KL divergence from the teacher's distribution to the student's, in nats. 0 is a perfect copy.",
    "exposure": "Mean bits by which planted secrets are preferred to those they could have been; 1.44 by chance. Lower is safer.",
    "golden": "KL of whole texts from the oracle to the student, in nats a held-out text. 0 is the truth.",
    "proxy": "KL of whole texts from the teacher to the student, in nats a held-out text. 0 is a perfect copy.",
    "golden_per_token": "`golden` divided by the tokens of its texts.",
    "proxy_per_token": "`proxy` divided by the tokens of its texts.",
    "golden_rise": "How far `golden` on validation ends above its least, as a share of that.",
    "proxy_drop": "How far `proxy` on validation falls from there to the end, as a share.",
    "hacking": "Whether golden rises by more than 2 % while the student still nears its teacher (1) or not (0).",
    "satisfaction": "Mean score of the student's answers with the library, by the judge, 1 to 10.",
    "baseline_satisfaction": "Satisfaction without the library, on the same conversations.",
    "right_type": "Share of the advised conversations whose first strategy was written for their type.",
    "gain": "Mean paired difference of satisfaction with and without the library.",
    "paired_p": "Two-sided p-value of the paired t-test.",
    "sign_p": "Exact two-sided p-value of the sign test, ties left out.",
    "advised": "Share of conversations for which the library has a strategy.",
    "rewards/chosen": "Mean implicit reward of the better candidates: beta times the log-ratio to the reference, as in TRL.",
    "rewards/rejected": "The same of the worse candidates. Both falling together is a collapse.",
    "rewards/margins": "Mean reward of the better candidate less that of the worse one. Higher is better.",
    "rewards/accuracies": "Share of pairs whose better candidate has the higher reward. 1 is perfect.",
    "logps/chosen": "Mean log-probability of the better candidates under the student, in nats.",
    "logps/rejected": "Mean log-probability of the worse candidates under the student, in nats.",
    "win_rate": "How often a sample of the student has a higher true reward than one of itself before training, a tie as a half. 0.5 is no change.",
    "displacement/both_fall": "Share of pairs both of whose answers are less likely than under the reference model.",
    "displacement/preferred_falls": "Share of pairs whose better answer is less likely than under the reference model.",
    "value": "Worth of the policy in a world of known truth: probability of the best item, return less KL, or less the KL from the target. Higher is better.",
    "start_accuracy": "`accuracy` of the policy before its first round, on the same questions.",
    "start_value": "`value` of the world's reference policy.",
    "forward_kl": "Exact KL divergence from the world's truth to the policy, in nats a text. 0 is the truth.",
    "reverse_kl": "Exact KL divergence from the policy to the world's truth, in nats a text. 0 is the truth.",
    "true_log_prob": "Mean log-probability, under the world's truth, of a text that the policy writes, in nats.",
    "did_entropy": "Entropy of policy / reference, normalised, in nats: at most log of the number of responses, as where nothing changed.",
    "return": "Exact expected return of the policy in its world. Higher is better.",
    "kl_to_reference": "Exact KL divergence of the policy from the world's reference chain, in nats.",
    "ndcg_10": "Normalised discounted gain of the first ten documents, graded. 1 is the ideal order.",
    "mrr_10": "Mean of 1 / rank of the first relevant document, 0 if it is not among the first ten. 1 is perfect.",
    "recall_10": "Share of the relevant documents among the first ten. 1 is perfect.",
    "high_frequency_cosine": "Cosine between student's and teacher's differences along edges of the graph. 1 is a perfect copy.",
    "distance": "Distance of the samples from the reference's. Lower is better.",
    "nfe": "Network calls for one sample.",
    "coverage": "Share of the modes or classes that samples reach at least a quarter as often as real ones. 1 is all.",
    "rmse": "Root mean square difference to the teacher's sample from the same noise. 0 is a perfect copy.",
    "chamfer": "Mean distance from a point to the nearest one of the other cloud, both ways. Lower is better.",
    "jsd": "Jensen-Shannon distance between the voxels of both clouds, 0 to 0.83. Lower is better.",
    "iou": "Share of the occupied voxels of either cloud that both occupy. 1 is perfect.",
    "input_chamfer": "`chamfer` of the scan itself.",
    "refined_distance": "`distance` after a few steps of the teacher from the student's sample. Lower is better.",
    "refined_rmse": "`rmse` after a few steps of the teacher from the student's sample.",
    "refined_nfe": "Network calls for one refined sample.",
    "stored_teacher_calls": "Teacher calls that the stored pairs cost.",
    "affinity_kl": "KL divergence between student's and teacher's graphs of neighbouring patches. 0 is a perfect copy.",
    "neighbour_overlap": "Share of each patch's nearest neighbours that student and teacher have in common.",
    "merge_agreement": "Share of examples on which the merged head chooses the class that the subclasses' sum does.",
    "alpha": "Mean weight of the teacher, by the learned ratio; the rest is the label's.",
    "alpha_agreed": "The same where teacher and label agree.",
    "alpha_disputed": "The same where teacher and label differ.",
    "alpha_teacher_right": "The same where the teacher is right and the label wrong.",
    "alpha_label_right": "The same where the label is right and the teacher wrong.",
    "alpha_gap": "alpha_teacher_right less alpha_label_right: above 0, the ratio trusts the side that is right.",
    "student_steps": "Updates in which the student moved.",
    "augmentor_steps": "Updates in which the augmentor moved.",
    "saturated": "Whether the augmentor reached its bound (1) or not (0).",
    "augmentor_shift": "Mean move that the augmentor learned.",
    "augmentor_spread": "Size of the random moves that the augmentor learned.",
    "augmentor_spread_moves": "The same of translations alone.",
    "student_valid": "Share of the student's sampled answers that are true. 1 is perfect.",
    "student_greedy_valid": "Share of the student's greedy answers that are true. 1 is perfect.",
    "student_accepted": "Share of the student's sampled answers that the critic accepts.",
    "student_greedy_accepted": "Share of the student's greedy answers that the critic accepts.",
    "teacher_valid": "Share of what the teacher wrote about held-out events that is true.",
    "teacher_accepted": "Share of what the teacher wrote about held-out events that the critic accepts.",
    "kept_share": "Share of the corpus that the filter kept.",
    "corpus_precision": "Share of the written corpus that is true.",
    "kept_precision": "Share of the kept corpus that is true.",
    "cutoff": "Critic's score above which a triple is kept.",
    "labels_precision": "Precision at the cutoff on the critic's validation labels.",
    "labels_recall": "Recall at the cutoff on the critic's validation labels.",
    "labels_strict_precision": "The same precision of scores strictly above the cutoff, as filtering does.",
    "labels_strict_recall": "The same recall of scores strictly above the cutoff, as filtering does.",
    "private_nll": "Mean negative log-likelihood of private tokens, in nats. Higher is safer.",
    "uniform_targets": "Share of training targets that noise clipped whole: they are uniform and teach nothing.",
    "public_nll": "Mean negative log-likelihood of all other tokens, in nats. Lower is better.",
    "worst_ratio": "Perplexity of the student divided by the teacher's, in the domain where it is largest. 1 is a perfect copy.",
    "mean_ratio": "Mean of that ratio over the domains.",
    "largest_weight": "The largest share of a domain in what is drawn.",
    "weight_change": "Mean change of the domains' weights from one measurement to the next.",
    "class_accuracy": "Share of the samples that a classifier of real examples takes for the class asked for. 1 is perfect.",
    "detail": "Detail of the samples (mean squared Laplacian) divided by that of real ones: below 1 blurred, above 1 noisy.",
    "detail_gap": "How far `detail` is from 1. Lower is better.",
    "routing_entropy": "Entropy of how often each way is used, as a share of the largest: 1 is even use, 0 one way alone.",
    "rationale_accuracy": "Share of questions that are answered right behind a rationale of the student's own.",
    "discriminator_auc": "Probability that the discriminator prefers a right rationale to a wrong one; 0.5 by chance.",
    "few_shot_accuracy": "Share of questions that the student answers right with examples in its prompt.",
    "drafts_score": "Mean usefulness of the teacher's drafts as examples for the student, from 0 to 1.",
    "tailored_score": "The same of what the teacher wrote after learning what helps the student.",
    "chosen_teacher_accuracy": "Share of the smoke questions that the chosen teacher answers right.",
    "target_accuracy": "Share of the teacher's targets that are right.",
    "well_formed": "Share of the written texts that are statements of the form asked for.",
}
_CORPORA = {"corpus": "the written corpus", "kept": "the kept corpus", "student": "the student's answers"}
_SIZES = {"size": "Triples", "unique": "Different tails", "soft_unique": "Different tails, near-copies taken together,"}


def meaning(name: str, explained: Mapping[str, str] | None = None) -> str:
    """The explanation of a metric.

    Args:
        name: of the metric.
        explained: explanations that the run provides, which take precedence.
    """
    known = {**MEANINGS, **(explained or {})}
    if name in known:
        return known[name]
    if found := re.fullmatch(r"teacher_(\d+)_distance", name):
        return f"`distance` of the teacher's samples at {found[1]} steps."
    if found := re.fullmatch(r"(student|teacher)_(\d+)_chamfer", name):
        return f"`chamfer` of the {found[1]}'s clouds at {found[2]} steps."
    if found := re.fullmatch(r"fresh_accuracy_(.+?)(_texts)?", name):
        made = "the texts nearest to the distilled embeddings" if found[2] else "the distilled examples alone"
        return f"Accuracy of new networks {found[1]} that are trained on {made}."
    if found := re.fullmatch(r"(\w+)_entropy", name):
        return f"Mean entropy of the tokens in what {found[1]} wrote, in nats."
    if name.startswith("teacher_"):
        return f"Of the teacher: {meaning(name.removeprefix('teacher_'), explained)}"
    if name.startswith("transfer_"):
        return f"Of another student with the same library: {meaning(name.removeprefix('transfer_'), explained)}"
    if found := re.fullmatch(r"retrieval_(\w+?)_(\d+)", name):
        first = known.get(f"{found[1]}_10", "").replace("ten", found[2])
        return f"In exact search through all documents: {first}"
    if found := re.fullmatch(r"(kept|pool)_from_(\w+)", name):
        return f"Share of the images {'that were selected' if found[1] == 'kept' else 'of the pool'} that come from {found[2]}."
    if name.startswith("augmentor_share_"):
        return "Share of this operation in the augmentor's mixture."
    if found := re.fullmatch(rf"({'|'.join(_CORPORA)})_({'|'.join(_SIZES)})", name):
        return f"{_SIZES[found[2]]} in {_CORPORA[found[1]]}."
    for other in sorted(known, key=len, reverse=True):
        if name.startswith(f"{other}_"):
            return f"On the further test set {name.removeprefix(f'{other}_')!r}: {known[other]}"
    return "A measure of the method's own: see its page (`understudy show`)."
