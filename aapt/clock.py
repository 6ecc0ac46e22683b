"""The clock of every model: video frames, latent frames and seconds."""

FPS = 24  # video frames per second
FRAMES_PER_LATENT = 4  # video frames per latent frame; the first latent frame holds one
STEPS_PER_SECOND = FPS // FRAMES_PER_LATENT  # latent frames, one per step
STEP_SECONDS = FRAMES_PER_LATENT / FPS
SHEET_SECONDS = (0, 1, 5, 10, 30, 60)  # columns of a contact sheet
