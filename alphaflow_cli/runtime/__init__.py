"""The ground under long work: who we are among N processes, starting them, locks, progress, precision."""
