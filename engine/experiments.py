"""The lab book: the experiments of the project's log, each a flat diff from the row it builds on,
and from 27 on what the log left to be tried.

Pure data. `BASE` holds what the log calls common to all; a row names its parent, what it changes
(train.py's constants in lower case), the log's own words and the figures the log recorded (miss
rate in %, measured by an evaluator that drops frames without detections; "all / day / night").
"""

from __future__ import annotations

BASE = {
    "seed": 42,
    "input_mode": "lwir",
    "input_size": (300, 300),
    "batch_norm": False,
    "width": 1.0,
    "priors": "ssd300",
    "pretrained": "imagenet",
    "infusion": (0, 0, 0, 0, 0, 0),
    "infusion_conv": False,
    "seg_cells": "mean",
    "seg_maps": "mean",
    "seg_weight": 1.0,
    "masks_follow": False,
    "out_of_range": "keep",
    "loc_loss": "l1",
    "loc_reduction": "mean",
    "optimizer": "sgd",
    "lr": 1e-3,
    "bias_lr_factor": 2.0,
    "weight_decay": 5e-4,
    "ema_decay": 0.0,
    "schedule": "constant",
    "batch_size": 8,
    "epochs": 122,
    "validation": 0.1,
    "augment": False,
    "zoom_out": 4.0,
    "hue_saturation": True,
    "lwir_jitter": True,
    "copy_paste": 0.0,
    "modality_dropout": 0.0,
    "min_height": 12.0,
    "margin": 5.0,
    "eval_every": 5,
    "min_score": 0.2,
    "nms_iou": 0.5,
    "max_boxes": 200,
    "test_flip": False,
}

EXPERIMENTS = {
    "1": {
        "based_on": None,
        "change": {},
        "words": "LWIR, SGD, lr 1e-3, batch 8, 120k iterations, decay that never fired, L1, "
        "no augmentation beyond resize, 10% of train held out",
        "logged": "train loss 0.2 at epoch 80, validation loss above 2: overfits",
    },
    "2": {
        "based_on": "1",
        "change": {"optimizer": "adam"},
        "words": "Adam",
        "logged": "NaN after about 30 epochs; 43.63 at epoch 25",
    },
    "3": {
        "based_on": "2",
        "change": {"lr": 5e-4, "batch_size": 32, "epochs": 150, "schedule": "step"},
        "words": "lr 5e-4, batch 32, 150 epochs, decay at 2/3 and 5/6",
        "logged": "",
    },
    "4": {
        "based_on": "1",
        "change": {
            "lr": 5e-4, "batch_size": 32, "epochs": 150, "schedule": "step",
            "augment": True, "validation": 0.0,
        },
        "words": "SGD, lr 5e-4, batch 32, 150 epochs, SSD augmentation, all frames",
        "logged": "29.03, recall 0.8330 (epoch 130)",
    },
    "5": {
        "based_on": "4",
        "change": {"validation": 0.1},
        "words": "10% validation split",
        "logged": "",
    },
    "6": {"based_on": "5", "change": {"optimizer": "adam"}, "words": "Adam", "logged": ""},
    "7": {
        "based_on": "6",
        "change": {"loc_loss": "smooth_l1"},
        "words": "smooth L1",
        "logged": "",
    },
    "8": {"based_on": "7", "change": {"epochs": 300}, "words": "300 epochs", "logged": ""},
    "9": {
        "based_on": "7",
        "change": {"validation": 0.0},
        "words": "no validation split, all frames",
        "logged": "29.18, recall 0.8029",
    },
    "10": {
        "based_on": "9",
        "change": {"epochs": 120},
        "words": "120 epochs",
        "logged": "27.72, recall 0.8092",
    },
    "11": {
        "based_on": "9",
        "change": {"epochs": 100},
        "words": "100 epochs (kept from here on)",
        "logged": "28.55, recall 0.8131",
    },
    "12": {
        "based_on": "11",
        "change": {"batch_norm": True},
        "words": "VGG16 with BatchNorm",
        "logged": "28.25, recall 0.8173; 27.93 / 33.82 / 16.06",
    },
    "13": {
        "based_on": "12",
        "change": {"input_mode": "visible"},
        "words": "visible input",
        "logged": "35.52, recall 0.7742; 36.34 / 33.86 / 42.52",
    },
    "14": {
        "based_on": "12",
        "change": {"input_mode": "mean"},
        "words": "visible + LWIR input, averaged into 3 channels",
        "logged": "34.75 / 35.27 / 33.55",
    },
    "15": {"based_on": "13", "change": {"lr": 1e-3}, "words": "lr 1e-3", "logged": ""},
    "16": {
        "based_on": "12",
        "change": {"eval_every": 10},
        "words": "evaluate every 10 epochs",
        "logged": "",
    },
    "17": {
        "based_on": "13",
        "change": {"eval_every": 10},
        "words": "evaluate every 10 epochs",
        "logged": "",
    },
    "18": {
        "based_on": "12",
        "change": {"infusion": (1, 1, 0, 0, 0, 0)},
        "words": "segmentation infusion on maps [1,1,0,0,0,0], mean over maps",
        "logged": "29.03, recall 0.8102; 29.02 / 33.77 / 19.17",
    },
    "19": {
        "based_on": "18",
        "change": {"seg_maps": "sum"},
        "words": "sum over maps",
        "logged": "26.09, recall 0.8296; 26.33 / 31.38 / 15.89",
    },
    "20": {
        "based_on": "19",
        "change": {"infusion": (1, 1, 1, 0, 0, 0)},
        "words": "maps [1,1,1,0,0,0]",
        "logged": "27.72 / 32.78 / 16.59",
    },
    "21": {
        "based_on": "20",
        "change": {"infusion_conv": True},
        "words": "3x3 conv (same width) before the 1x1",
        "logged": "27.12 / 33.33 / 14.15",
    },
    "22": {
        "based_on": "19",
        "change": {"infusion": (1, 1, 1, 1, 1, 1)},
        "words": "maps [1,1,1,1,1,1]",
        "logged": "",
    },
    "23": {
        "based_on": "19",
        "change": {"infusion": (1, 0, 0, 0, 0, 0)},
        "words": "maps [1,0,0,0,0,0]",
        "logged": "",
    },
    "24": {
        "based_on": "23",
        "change": {"seg_cells": "mean"},
        "words": "per-map mean over cells, each loss term recorded",
        "logged": "",
    },
    "25": {
        "based_on": "24",
        "change": {"seg_cells": "sum"},
        "words": "per-map sum over cells",
        "logged": "",
    },
    "26": {
        "based_on": "23",
        "change": {"masks_follow": True},
        "words": "masks follow the augmentation",
        "logged": "",
    },
    "27": {
        "based_on": "26",
        "change": {"out_of_range": "background"},
        "words": "an idea the log left open: persons that no prior of a map matches are background "
        "in its mask",
        "logged": "",
    },
    "28": {
        "based_on": "26",
        "change": {"out_of_range": "ignore"},
        "words": "the same, but ignored",
        "logged": "",
    },
    "29": {
        "based_on": "22",
        "change": {"masks_follow": True, "seg_maps": "uncertainty"},
        "words": "the other idea it left open: 22 with masks that follow the augmentation, the "
        "maps' losses weighted by learned uncertainty",
        "logged": "",
    },
    "30": {
        "based_on": "26",
        "change": {"copy_paste": 0.5},
        "words": "tried after the log: people of other frames pasted into half of the frames",
        "logged": "",
    },
    "31": {
        "based_on": "26",
        "change": {"priors": "pedestrian"},
        "words": "beyond the log: priors of a person's shape (python -m tools.priors shows why)",
        "logged": "",
    },
    "32": {
        "based_on": "26",
        "change": {"input_size": (512, 640)},
        "words": "beyond the log: the frame at its own size and shape",
        "logged": "",
    },
    "33": {
        "based_on": "26",
        "change": {"input_mode": "halfway"},
        "words": "beyond the log: visible and LWIR in two streams, joined after conv4_3",
        "logged": "",
    },
    "34": {
        "based_on": "33",
        "change": {"modality_dropout": 0.25},
        "words": "the same, and one sample in four sees one modality alone: either may be missing "
        "at test time",
        "logged": "",
    },
    "35": {
        "based_on": "26",
        "change": {"pretrained": "coco", "batch_norm": False, "priors": "ssd300-coco"},
        "words": "beyond the log: to start from torchvision's SSD300 of COCO, with what its "
        "weights need: no BatchNorm, and COCO's priors so that its heads fit",
        "logged": "",
    },
    "36": {
        "based_on": "26",
        "change": {"ema_decay": 0.999},
        "words": "beyond the log: weights averaged over about 1,000 steps",
        "logged": "",
    },
    "37": {
        "based_on": "26",
        "change": {"schedule": "cosine"},
        "words": "beyond the log: cosine schedule with warm-up",
        "logged": "",
    },
    "38": {
        "based_on": "26",
        "change": {"test_flip": True},
        "words": "beyond the log: detections averaged over frame and mirror image",
        "logged": "",
    },
    "39": {
        "based_on": "33",
        "change": {
            "priors": "pedestrian", "input_size": (512, 640), "ema_decay": 0.999,
            "schedule": "cosine", "test_flip": True,
        },
        "words": "rows 31, 32, 33, 36, 37 and 38 together (35 excludes BatchNorm)",
        "logged": "",
    },
    "40": {
        "based_on": "33",
        "change": {"priors": "pedestrian", "test_flip": True},
        "words": "rows 31, 33 and 38 together: what helped on the demo set at no larger an input "
        "(python -m tools.study beyond)",
        "logged": "",
    },
    "demo": {
        "based_on": "26",
        "change": {
            "input_mode": "early", "width": 0.125, "priors": "pedestrian", "pretrained": "none",
            "infusion": (1, 1, 0, 0, 0, 0), "loc_reduction": "sum", "lr": 2e-3,
            "weight_decay": 1e-5, "schedule": "cosine", "batch_size": 8, "epochs": 16,
            "zoom_out": 1.5, "eval_every": 8, "min_score": 0.01, "nms_iou": 0.45,
        },
        "words": "not of the log: a narrow network on both modalities for the demo set",
        "logged": "",
    },
}  # fmt: skip
