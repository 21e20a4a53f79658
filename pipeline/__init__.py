"""The pipeline, from the submission of a job to its receipt. Its packages, in the order in which data passes them:

    core/               pure code: jobs, chunks, models, options, errors, OpenAI's wire format
    infra/              settings, logs, metrics, HTTP, storage, leases
    db/                 the schema, the migration runner, every SQL statement as a named function
    catalog/            models, their rates by kind of device, and vector spaces; API keys
    sources/            readers and validation of files, tables and queries
    ingest/             submission of a job: options, staging, chunking; requests made in SQL; the estimate
    dispatch/           leader election, scheduler (fair share), maintenance, completion, background tasks
    broker              outgoing messages, each with the address of one chunk
    chunk_io/           the reader of a claimed chunk, and the one transaction that commits it to its sink
    jobs/               control, status, receipt and its verification, results, purge, restore
    webhooks/           events, the allowlist of receivers, and delivery
    batch_api/          OpenAI's batch requests: input files become jobs, results become output files
    doctor/             diagnosis of a deployment; the health check of a process
    embedded/           servers from wheels, the process tree of `vectormill up`
    cli/, api/          command line and HTTP; api/: v1 (OpenAI's), the gateway behind it, status, dashboard

Workers live in `workers/`; nothing here imports torch.
"""
