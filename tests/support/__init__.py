"""What tests of several kinds are made with: models, jobs, messages, lines that break, servers that misbehave."""
