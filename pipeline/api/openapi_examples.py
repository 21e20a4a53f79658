"""Examples for the OpenAPI description: request and response bodies, by schema title."""

from collections.abc import Iterator
from typing import Any

_JOB_ID = "0198c2d1-6f00-7c3a-9d41-2b7e5a1c9f10"
_MODEL = "all-MiniLM-L6-v2"
_JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "name": "docs-nightly",
    "workspace": "default",
    "state": "running",
    "reason": None,
    "message": None,
    "model": _MODEL,
    "labels": {"team": "search"},
    "output": None,
    "notices": [],
    "items": {
        "total": 50_000,
        "embedded": 34_322,
        "reused": 0,
        "unchanged": 0,
        "rejected": 42,
        "cancelled": 0,
        "pending": 15_636,
        "truncated": 310,
        "removed": 0,
    },
    "tokens": {"prompt": 2_882_714},
    "rate": {"items_per_second": 52.1, "tokens_per_second": 4_380.5, "roofline": 0.81},
    "eta_seconds": 300.1,
    "chunks": {"pending": 60, "running": 2, "done": 138, "cancelled": 0},
    "created_at": "2026-11-24T01:00:02Z",
    "started_at": "2026-11-24T01:00:03Z",
    "finished_at": None,
}
_KEY = {
    "id": "4f1c2a9be07d3358",
    "name": "nightly",
    "admin": False,
    "live": True,
    "created_at": "2026-11-01T09:00:00Z",
    "expires_at": "2027-02-01T09:00:00Z",
    "revoked_at": None,
}
_COLLECTION = {
    "name": "tickets",
    "view": 'vectormill."tickets"',
    "model": _MODEL,
    "dimensions": 384,
    "keys": 200_008,
    "options": {"text": "{subject}\n\n{body}", "carry": ["lang"]},
    "expect_every_seconds": 86_400.0,
    "synced_at": "2026-11-24T01:00:16Z",
    "running": None,
    "created_at": "2026-11-01T09:00:00Z",
    "output": {
        "uri": "s3://shop-vectors/tickets",
        "version": 23,
        "files": 25,
        "rows": 248_113,
        "bytes": 390_114_502,
        "written_at": "2026-11-24T01:00:19Z",
        "behind": False,
        "problem": None,
    },
    "versions": [
        {
            "state": "next",
            "model": "bge-small-en-v1.5",
            "dimensions": 384,
            "keys": 200_008,
            "running": None,
            "differs": None,
            "kept_until": None,
            "output": None,
        }
    ],
}
_MODEL_OBJECT = {
    "id": _MODEL,
    "object": "model",
    "created": 1_795_500_000,
    "owned_by": "vectormill",
    "dimensions": 384,
    "shorter_dimensions": [],
    "max_tokens": 256,
    "query_prompt": "",
    "document_prompt": "",
    "price_per_million_tokens": 0.02,
    "aliases": ["text-embedding-3-small"],
    "deprecated_at": None,
    "replaced_by": None,
}
_SEEN = {"started_at": "2026-11-24T00:00:00Z", "seen_at": "2026-11-24T01:10:00Z"}

_FILE = {
    "id": "file-0198c2d16f007c3a9d412b7e5a1c9f10",
    "object": "file",
    "bytes": 1_204_331,
    "created_at": 1_795_500_000,
    "expires_at": 1_798_092_000,
    "filename": "nightly.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_BATCH = {
    "id": "batch_0198c2d26f007c3a9d412b7e5a1c9f11",
    "object": "batch",
    "endpoint": "/v1/embeddings",
    "model": _MODEL,
    "errors": None,
    "input_file_id": _FILE["id"],
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1_795_500_010,
    "in_progress_at": 1_795_500_012,
    "expires_at": 1_795_586_410,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 10_000, "completed": 6_144, "failed": 100},
    "usage": None,
    "metadata": {"run": "2026-11-24"},
    "job_id": _JOB_ID,
}

#: Schema title → example.
EXAMPLES: dict[str, Any] = {
    "EmbeddingRequest": {"model": _MODEL, "input": ["A mill grinds grain."], "encoding_format": "float"},
    "EmbeddingList": {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.0213, -0.0547, 0.0089]}],
        "model": _MODEL,
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    },
    "ModelObject": _MODEL_OBJECT,
    "ModelList": {"object": "list", "data": [_MODEL_OBJECT]},
    "FileObject": _FILE,
    "FileList": {"object": "list", "data": [_FILE], "has_more": False, "first_id": _FILE["id"], "last_id": _FILE["id"]},
    "FileDeleted": {"id": _FILE["id"], "object": "file", "deleted": True},
    "NewBatch": {
        "input_file_id": _FILE["id"],
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
        "metadata": {"run": "2026-11-24"},
    },
    "Batch": _BATCH,
    "BatchList": {
        "object": "list",
        "data": [_BATCH],
        "has_more": False,
        "first_id": _BATCH["id"],
        "last_id": _BATCH["id"],
    },
    "ErrorEnvelope": {
        "error": {
            "message": 'The model "m" is not enabled for your workspace.',
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    },
    "Problem": {
        "type": "about:blank",
        "title": "illegal transition",
        "status": 409,
        "detail": f"job {_JOB_ID} is completed and can't be paused.",
    },
    "JobRequest": {
        "model": _MODEL,
        "name": "docs-nightly",
        "sources": ["s3://corpus/2026-11/*.parquet"],
        "key_column": "doc_id",
        "text": "{subject}\n\n{body}",
        "split": 256,
        "labels": {"team": "search"},
        "by_reference": True,
        "output": "s3://vectors/2026-11",
        "webhook": "https://etl.example.com/hooks/vectormill",
    },
    "JobStatus": _JOB,
    "JobPage": {"data": [_JOB], "has_more": True, "after": _JOB_ID},
    "ChunkPage": {
        "data": [
            {
                "id": 1_204,
                "ordinal": 0,
                "first_index": 0,
                "items": 500,
                "state": "done",
                "fence": 1,
                "crashes": 0,
                "last_error": None,
                "embedded": 499,
                "reused": 0,
                "rejected": 1,
                "cancelled": 0,
                "truncated": 3,
                "prompt_tokens": 41_200,
                "passages": 0,
                "lost_tokens": 118,
                "output_uri": None,
                "lease_until": None,
                "not_before": None,
                "started_at": "2026-11-24T01:00:03Z",
                "finished_at": "2026-11-24T01:00:13Z",
            }
        ],
        "has_more": True,
        "after": 0,
    },
    "RejectPage": {
        "data": [{"index": 7, "key": "doc-7", "code": "empty_text", "message": "line 8: text is empty"}],
        "counts": {"empty_text": 28, "too_long": 14},
        "has_more": True,
        "after": 7,
    },
    "Receipt": {
        "id": _JOB_ID,
        "state": "completed",
        "items": {
            "in": 50_000,
            "embedded": 49_958,
            "reused": 0,
            "unchanged": 0,
            "rejected": 42,
            "cancelled": 0,
            "removed": 0,
        },
        "tokens": {"prompt": 4_120_880, "billed": 4_120_880, "unanswered": 0, "reused": 0, "saved": 0},
        "truncated": 372,
        "embedded_on": [{"device": "NVIDIA H200", "precision": "bfloat16", "items": 49_958, "tokens": 4_120_880}],
        "balanced": True,
        "verified": True,
        "missing": 0,
        "double": 0,
    },
    "NewCollection": {
        "name": "tickets",
        "model": _MODEL,
        "text": "{subject}\n\n{body}",
        "carry": ["lang"],
        "expect_every_seconds": 86_400,
    },
    "Upgrade": {"model": "bge-small-en-v1.5"},
    "Swap": {"keep_seconds": 604_800},
    "Comparison": {
        "model": _MODEL,
        "next_model": "bge-small-en-v1.5",
        "keys": 200_008,
        "next_keys": 200_008,
        "tokens": 17_200_688,
        "cost": 0.34,
        "sampled": 100,
        "overlap_at_10": 0.62,
    },
    "ForgetRequest": {"keys": ["customer-4711"], "collection": "tickets"},
    "Allowed": {"allowed": 1},
    "ForgetStatus": {
        "id": _JOB_ID,
        "keys": 1,
        "items": 14,
        "collected": 2,
        "requested_by": "key 4f1c2a9be07d3358",
        "waits_for": None,
        "problem": None,
        "created_at": "2026-11-24T01:00:02Z",
        "finished_at": "2026-11-24T01:00:03Z",
        "outputs": [],
        "more_outputs": 0,
        "tables": [],
    },
    "SyncRequest": {"sources": ["s3://shop/tickets/*.parquet"], "labels": {"team": "search"}},
    "CollectionStatus": _COLLECTION,
    "CollectionList": {"data": [_COLLECTION]},
    "SyncList": {
        "data": [
            {
                "job_id": _JOB_ID,
                "state": "completed",
                "model": _MODEL,
                "beside": False,
                "delta": False,
                "added": 1_010,
                "changed": 2_004,
                "unchanged": 196_986,
                "removed": 1_002,
                "rejected": 0,
                "tokens_saved": 16_940_796,
                "seconds": 14.2,
                "created_at": "2026-11-24T01:00:02Z",
                "finished_at": "2026-11-24T01:00:16Z",
            }
        ]
    },
    "SearchRequest": {"query": "refund after a late delivery", "limit": 3, "where": {"lang": "en"}},
    "Hits": {
        "data": [
            {
                "key": "ticket-4711",
                "similarity": 0.8213,
                "index": None,
                "text": None,
                "carried": {"lang": "en"},
                "passage": None,
                "start": None,
                "stop": None,
            }
        ]
    },
    "Retried": {"reopened_chunks": 2, "job": {**_JOB, "state": "queued"}},
    "Priority": {"priority": 10},
    "Fleet": {
        "workers": [
            {
                "id": "7d0f6c1e-58a4-4a0e-9c6c-0c6b8f0f4a11",
                "name": "cuda0-3f9a1c@gpu-1",
                "host": "gpu-1",
                "device": "cuda:0",
                "device_kinds": ["NVIDIA H200"],
                "models": [_MODEL],
                "dropped": {},
                "slots": 2,
                "resting": None,
                **_SEEN,
            }
        ],
        "engines": [
            {"id": "1b7d2f5a-0d7e-4a53-8f5e-6a3b2c1d0e9f", "device": "cpu", "models": [_MODEL], **_SEEN},
        ],
    },
    "Catalogue": {
        "data": [
            {
                "name": _MODEL,
                "kind": "local",
                "aliases": ["text-embedding-3-small"],
                "dimensions": 384,
                "matryoshka": [],
                "max_item_tokens": 256,
                "tokens_per_second": 4_400.0,
                "rates": [
                    {
                        "device": "NVIDIA H200",
                        "precision": "bfloat16",
                        "tokens_per_second": 890_000.0,
                        "measured_at": "2026-11-24T01:04:00Z",
                    }
                ],
                "deprecated_at": None,
                "replaced_by": None,
                "price_per_million": 0.02,
                "added_at": "2026-11-01T09:00:00Z",
            }
        ]
    },
    "UsageList": {
        "begin": "2026-11-01T00:00:00Z",
        "end": "2026-11-24T00:00:00Z",
        "by": "day",
        "data": [
            {
                "group": "2026-11-23",
                "requests": 1_204,
                "items": 61_000,
                "prompt_tokens": 5_020_110,
                "total_tokens": 5_020_110,
                "reused_tokens": 0,
                "truncated": 330,
                "cost": "0.1004",
            }
        ],
    },
    "KeyWish": {"name": "nightly", "admin": False, "expires_in_days": 90},
    "Rotation": {"overlap_hours": 24},
    "MadeKey": {"id": "4f1c2a9be07d3358", "token": f"vm_{_KEY['id']}_…"},
    "Key": _KEY,
}


def add_examples(description: dict[str, Any]) -> None:
    """Add its example to each schema that has one here."""
    for schema in list(_schemas(description)):
        schema["examples"] = [EXAMPLES[schema["title"]]]


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the object schemas of a description that have an example, at any depth."""
    if isinstance(node, dict):
        title = node.get("title")
        if isinstance(title, str) and title in EXAMPLES and "properties" in node:
            yield node
        for part in node.values():
            yield from _schemas(part)
    elif isinstance(node, list):
        for part in node:
            yield from _schemas(part)
