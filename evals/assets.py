"""Dagster assets `evals/*`: the quality of the models on the golden set, checked against a stored baseline."""

from typing import Any

import dagster as dg

GROUP = "evals"
OWNERS = ["team:ml-platform"]
STORE_COMMAND = "media-assets evaluate --store-baseline"
DESCRIPTIONS = {
    "asr": "Word error rate of `transcript` per language, and words heard in clips without speech.",
    "ocr": "Character error rate of `ocr_text`, in reading order and in any order; recall of on-screen text.",
    "shots": "Precision, recall and F1 of hard cuts within 2 frames; gradual transitions found.",
    "retrieval": "Recall@1 and @5 of searching golden pictures by label and caption.",
    "moderation": "Precision and recall per moderation label, and on labelled texts.",
    "duplicates": "Precision and recall of near-duplicate pairs.",
}
INPUTS = {
    "asr": ["transcript"],
    "ocr": ["ocr_text"],
    "shots": ["shots"],
    "retrieval": ["embeddings"],
    "moderation": ["moderation_labels"],
    "duplicates": ["near_duplicates"],
}
KINDS = {"python", "parquet"}


def _build_asset(name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=dg.AssetKey([GROUP, name]),
        group_name=GROUP,
        kinds=KINDS,
        owners=OWNERS,
        deps=INPUTS[name],
        description=DESCRIPTIONS[name],
        required_resource_keys={"media"},
    )
    def evaluation(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        from evals.evaluate import evaluate
        from evals.probes import golden_for, reader_of

        media = context.resources.media
        with media.outcomes.lease(context.run.run_id):  # a purge waits for whoever may still write
            result = evaluate(name, golden_for(media), reader_of(media))
            path = result.write(media.settings.home)
        return dg.MaterializeResult(
            metadata=metadata_of(result, str(path)),
            data_version=dg.DataVersion(f"{result.model}/{result.golden_digest[:12]}"),
        )

    return evaluation


def metadata_of(result: Any, path: str) -> dict[str, Any]:
    """Figures, origin and picture of an EvalResult as Dagster metadata."""
    from evals.pictures import data_uri

    picture = data_uri(result.picture)
    return {
        **{name: figure.value for name, figure in result.figures.items()},
        "dagster/row_count": result.rows.num_rows,
        "golden set": result.golden,
        "model": result.model,
        "rows": dg.MetadataValue.path(path),
        **({"picture": dg.MetadataValue.md(picture)} if picture else {}),
    }


def _build_check(name: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=dg.AssetKey([GROUP, name]),
        name="no_regression",
        description="No figure is worse than its stored baseline by more than its tolerance.",
        required_resource_keys={"media"},
    )
    def no_regression(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from evals.probes import golden_for
        from evals.result import latest

        media = context.resources.media
        return check_result(latest(media.settings.home, name), golden_for(media), media.settings.home)

    return no_regression


def check_result(result: Any, golden: Any, home: Any) -> dg.AssetCheckResult:
    """The newest EvalResult against the baseline of its golden set: ERROR on a regression, WARN without a baseline."""
    from evals.baseline import Baseline, regressions

    if result is None or result.golden_digest != golden.digest:
        return _warning(f"No result for the golden set {golden.name}: materialize the asset first.")
    baseline = Baseline.load(golden, home)
    if baseline is None or result.name not in baseline.evals:
        return _warning(f"No baseline for the golden set {golden.name}. Store one: {STORE_COMMAND}")
    if baseline.digest != golden.digest:
        return _warning(f"The golden set {golden.name} has changed since its baseline. Store it anew: {STORE_COMMAND}")
    worse = regressions(result, baseline.evals[result.name])
    return dg.AssetCheckResult(
        passed=not worse,
        severity=dg.AssetCheckSeverity.ERROR,
        description="; ".join(map(str, worse)) or "Within the tolerances of the baseline.",
        metadata={
            "regressions": [str(regression) for regression in worse],
            "baseline model": baseline.evals[result.name].model,
            "model": result.model,
        },
    )


def _warning(text: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description=text)


eval_assets = [_build_asset(name) for name in DESCRIPTIONS]
eval_checks = [_build_check(name) for name in DESCRIPTIONS]
