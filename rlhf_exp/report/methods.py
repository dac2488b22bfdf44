"""How the numbers of a study were computed, for those who read its page."""

TERMS = (
    ("gold", "the reward that nobody trained on: what the completions are really worth"),
    ("proxy", "the reward that the policy was trained on"),
    (
        "KL",
        "how far the policy has moved from the start policy, in nats: mean over held-out prompts of "
        "log policy − log start, summed over the tokens of a completion (the estimator k1)",
    ),
    (
        "gain",
        "gold after training minus gold of the start policy",
    ),
    (
        "over-optimization gap",
        "gold at its peak minus gold after training. The peak is found on every other held-out "
        "prompt and measured on the rest, and the other way round, so that noise makes no peak",
    ),
    (
        "relative gain over single",
        "(gain − mean gain of the single reward) / mean gain of the single reward, the other "
        "settings being the same; not told where that mean gain may be zero",
    ),
    (
        "IQM",
        "interquartile mean: the mean of the middle half of the runs, which one odd seed moves "
        "little (Agarwal et al. 2021)",
    ),
)

NOTES = (
    "Intervals are 95 % bootstrap intervals. Over seeds, runs are resampled within each arm "
    "(stratified bootstrap, Agarwal et al. 2021). With few seeds plain percentiles are too narrow; "
    "the quantiles are those of Hesterberg's (2015) expanded percentile interval, Φ(−√(n/(n−1)) · "
    "t(0.975, n−1)) and its mirror, n being the number of seeds. One seed gives no interval over "
    "seeds.",
    "Contrasts are paired: runs of two arms with the same seed answer the same held-out prompts. "
    "Seeds and prompts are crossed, so both are resampled, independently (Owen 2007). A contrast "
    "over several strata is the mean over them. It is called higher or lower only where its "
    "interval excludes 0, and open otherwise; open is not the same as equal.",
    "More seeds: the smallest n with t(0.975, n−1) · s / √n below the mean difference, s being the "
    "standard deviation of the differences by seed, if the mean difference is real.",
    "Equal KL: gold on a run's own way from the start where KL first crosses the given value, "
    "interpolated linearly between two evaluations. Runs that never get there are left out; "
    "nothing is extrapolated.",
    "Gao fits (Gao et al. 2022), with d = √KL and R = gold − gold at the start: best-of-n "
    "R(d) = d (α − β d), RL R(d) = d (α − β ln d), by least squares on all evaluations of an arm. "
    "The predicted peak is at d = α / (2β) for best-of-n and d = exp(α/β − 1) for RL, if β > 0.",
)

LIMITS = (
    "Each interval is for its own comparison: nothing is corrected for there being many.",
    "Seeds share the start policy, the held-out prompts and, unless they are configured to differ, "
    "the preference pairs and reward models: intervals tell how another seed of the alignment "
    "would come out, not another start.",
    "KL of best-of-n is nominal, log n − (n − 1)/n: an upper bound on the real one.",
    "An interval over prompts alone (one seed) says nothing of other seeds.",
)

REFERENCES = (
    "Agarwal et al. 2021. Deep reinforcement learning at the edge of the statistical precipice. "
    "NeurIPS. arXiv 2108.13264.",
    "Owen 2007. The pigeonhole bootstrap. Annals of Applied Statistics 1(2).",
    "Hesterberg 2015. What teachers should know about the bootstrap. The American Statistician "
    "69(4).",
    "Gao, Schulman and Hilton 2022. Scaling laws for reward model overoptimization. "
    "arXiv 2210.10760.",
    "Coste et al. 2023. Reward model ensembles help mitigate overoptimization. arXiv 2310.02743.",
)
