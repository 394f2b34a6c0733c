//! A measured step as a picture.

use crate::pipeline::profile::{ActionSpan, SpanKind, StepProfile};
use crate::pipeline::schedule::Flow;
use crate::report::timeline::{Bar, BarKind, Lane, Timeline};

/// The picture of a step; `devices` are where its stages run, in words.
pub fn timeline(title: String, profile: &StepProfile, devices: &[String]) -> Timeline {
    let lane = |(rank, stage): (usize, &crate::pipeline::profile::StageProfile)| Lane {
        name: match devices.get(rank) {
            Some(device) => format!("stage {rank} ({device})"),
            None => format!("stage {rank}"),
        },
        idle: profile.idle(rank),
        bars: stage.spans.iter().map(bar).collect(),
    };
    Timeline {
        title,
        seconds: profile.seconds,
        lanes: profile.stages.iter().enumerate().map(lane).collect(),
    }
}

fn bar(span: &ActionSpan) -> Bar {
    let way = |flow| match flow {
        Flow::Forward => "activations",
        Flow::Backward => "gradients",
    };
    let (kind, label) = match span.what {
        SpanKind::Run(action) => match action.flow {
            Flow::Forward => (BarKind::Forward, action.to_string()),
            Flow::Backward => (BarKind::Backward, action.to_string()),
        },
        SpanKind::Wait(flow) => (BarKind::Waiting, format!("wait for {}", way(flow))),
        SpanKind::Agree => (BarKind::Waiting, "agree".to_owned()),
        SpanKind::Exchange(flow) => (BarKind::Exchange, format!("give {}", way(flow))),
        SpanKind::Prepare => (BarKind::Preparation, "prepare".to_owned()),
        SpanKind::Update => (BarKind::Update, "update".to_owned()),
    };
    Bar {
        kind,
        label,
        begin: span.begin,
        end: span.end,
    }
}
