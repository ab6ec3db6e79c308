"""Problems, texts and prompts that training, calibration and evaluation share."""
