"""The batch engine: streams media items through stages, with every item ending in exactly one outcome.

| module | what it is | runs in |
|---|---|---|
| `contract` | what a stage is and what it is handed | – |
| `versions` | the digest an item's artifact is stored under | any thread |
| `events` | what the engine says while it works; its only way out | – |
| `executors` | where background calls run, and how one that hangs is left behind | – |
| `calls` | preparing, assembling, writing and copying | the work lane |
| `inference` | the models: loading, micro-batches, isolation of what breaks one | the inference lane |
| `micro_batches` | units that wait for a model | the caller's thread |
| `recorder` | claims and endings of outcome records, many at a time | the caller's thread |
| `flights` | the items in flight, and how each of their stages is settled | the caller's thread |
| `scheduler` | one batch: what may run next, and what follows from each end | the caller's thread |
| `planning` | what is still to do for an item, judged from its records | any thread |
| `remote` | stages whose model is on a Ray cluster | as the stage |
| `tuning` | the micro-batch that is fastest here | the caller's thread |
| `batch` | `BatchEngine`, by which all this is used | the caller's thread |

Nothing here knows Dagster, a command line, or any particular stage.
"""
