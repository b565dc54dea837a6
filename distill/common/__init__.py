"""What every package uses: files, records, sources, the console, processes and hardware."""
