"""Options that several commands share."""

from typing import Annotated

import typer

from pipeline.core import options as core

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Workspace = Annotated[str, typer.Option(help="The workspace.")]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Stop waiting after this time; exit 7.")]
Wait = Annotated[bool, typer.Option("--wait", help="Stay until the job ends; the exit code says how.")]

# The source.
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE...",
        help=".jsonl, .csv, .tsv, .parquet (.gz, .zst): files, folders, globs, s3://, gs://, az:// URIs, or -",
    ),
]
FromUrl = Annotated[
    str | None, typer.Option("--from", metavar="URL", help="A database to query: postgresql://…, duckdb:///file.")
]
Delimiter = Annotated[
    str | None,
    typer.Option(metavar="SIGN", help="Delimiter of .csv and .tsv fields, or tab. Default: comma, tab."),
]
Quote = Annotated[
    str | None,
    typer.Option(metavar="SIGN", help='Quote character of .csv and .tsv, or none. Default: ", none.'),
]

# The job.
Label = Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label; may be repeated.")]
Priority = Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")]
Webhook = Annotated[
    str | None,
    typer.Option(metavar="URL", help="URL to notify when the job ends; the operator must allow it."),
]

# The texts and their vectors.
Model = Annotated[str, typer.Option(help="The model, by name or alias.")]
TextColumn = Annotated[str, typer.Option(help="The column or field that holds the texts.")]
Text = Annotated[
    str | None,
    typer.Option(metavar="TEMPLATE", help='Texts of several columns instead: "{subject} {body}".'),
]
KeyColumn = Annotated[str | None, typer.Option(help="The column that holds your keys. Default: id.")]
Dimensions = Annotated[int | None, typer.Option(min=1, help="Size of the vectors, if the model has several.")]
Precision = Annotated[
    core.Precision, typer.Option(help="Precision of the model: auto, as the workers are set up, or float32.")
]
MaxItemTokens = Annotated[int | None, typer.Option(min=1, max=1_000_000, help="The most tokens of a text to read.")]
OnLong = Annotated[
    core.OnLong, typer.Option(help="Treatment of a longer text: truncate, reject, or split into passages.")
]
Split = Annotated[
    int | None,
    typer.Option(
        min=core.LEAST_PASSAGE_TOKENS,
        metavar="TOKENS",
        help="Split texts into passages, each with a vector of its own.",
    ),
]
Overlap = Annotated[
    int, typer.Option(min=0, metavar="TOKENS", help="Most tokens of a passage that repeat the one before.")
]
SplitBy = Annotated[core.SplitBy, typer.Option(help="The largest unit that stays whole where it fits.")]
Title = Annotated[
    str | None,
    typer.Option(metavar="TEMPLATE", help='A title read before each passage, such as "{subject}".'),
]
NoReuse = Annotated[
    bool, typer.Option("--no-reuse", help="Embed every text, also one whose vector the workspace has already.")
]
