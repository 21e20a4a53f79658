"""Options that several commands share."""

from typing import Annotated

import typer

from pipeline.core import options as core

# Groups of options in a command's help.
USUAL, SOURCE, TEXT, MODEL, OUTPUT, JOB, WAITING = (
    "Usual options",
    "Source",
    "Text",
    "Model and vectors",
    "Output",
    "Job",
    "Waiting and trying out",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Workspace = Annotated[str, typer.Option(help="The workspace.")]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0, help="Stop waiting after this time; exit 7.", rich_help_panel=WAITING),
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Stay until the job ends; the exit code says how.", rich_help_panel=USUAL)
]

# The source.
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE...",
        help=".jsonl, .csv, .tsv, .parquet (.gz, .zst): files, folders, globs, s3://, gs://, az:// URIs, or -",
    ),
]
FromUrl = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="URL", help="A database to query: postgresql://…, duckdb:///file.", rich_help_panel=SOURCE
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        metavar="SIGN", help="Delimiter of .csv and .tsv fields, or tab. Default: comma, tab.", rich_help_panel=SOURCE
    ),
]
Quote = Annotated[
    str | None,
    typer.Option(
        metavar="SIGN", help='Quote character of .csv and .tsv, or none. Default: ", none.', rich_help_panel=SOURCE
    ),
]

# The job.
Label = Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label; may be repeated.", rich_help_panel=JOB)]
Priority = Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.", rich_help_panel=JOB)]
Webhook = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="URL to notify when the job ends; the operator must allow it.", rich_help_panel=JOB
    ),
]

# The texts and their vectors.
Model = Annotated[
    str | None,
    typer.Option(
        help="The model, by name or alias. Default: the only one there is.", show_default=False, rich_help_panel=USUAL
    ),
]
TextColumn = Annotated[str, typer.Option(help="The column or field that holds the texts.", rich_help_panel=TEXT)]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE",
        help='The text of one or several columns: "{body}", "{subject} {body}".',
        rich_help_panel=USUAL,
    ),
]
KeyColumn = Annotated[
    str | None, typer.Option(help="The column that holds your keys. Default: id.", rich_help_panel=USUAL)
]
Dimensions = Annotated[
    int | None, typer.Option(min=1, help="Size of the vectors, if the model has several.", rich_help_panel=MODEL)
]
Precision = Annotated[
    core.Precision,
    typer.Option(help="Precision of the model: auto, as the workers are set up, or float32.", rich_help_panel=MODEL),
]
MaxItemTokens = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, help="The most tokens of a text to read.", rich_help_panel=TEXT)
]
OnLong = Annotated[
    core.OnLong,
    typer.Option(help="Treatment of a longer text: truncate, reject, or split into passages.", rich_help_panel=TEXT),
]
Split = Annotated[
    int | None,
    typer.Option(
        min=core.LEAST_PASSAGE_TOKENS,
        metavar="TOKENS",
        help="Split texts into passages, each with a vector of its own.",
        rich_help_panel=TEXT,
    ),
]
Overlap = Annotated[
    int,
    typer.Option(
        min=0, metavar="TOKENS", help="Most tokens of a passage that repeat the one before.", rich_help_panel=TEXT
    ),
]
SplitBy = Annotated[
    core.SplitBy, typer.Option(help="The largest unit that stays whole where it fits.", rich_help_panel=TEXT)
]
Title = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE", help='A title read before each passage, such as "{subject}".', rich_help_panel=TEXT
    ),
]
NoReuse = Annotated[
    bool,
    typer.Option(
        "--no-reuse", help="Embed every text, also one whose vector the workspace has already.", rich_help_panel=MODEL
    ),
]
