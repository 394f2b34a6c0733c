//! A picture of one training step: what each stage did when, as an SVG and as a trace for
//! chrome://tracing and Perfetto.

use std::fmt::Write;

use serde::Serialize;

/// A step, drawn to time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timeline {
    /// What was measured, in words.
    pub title: String,
    /// When the step ended, in seconds from its beginning.
    pub seconds: f64,
    /// One per stage, from the first.
    pub lanes: Vec<Lane>,
}

/// What one stage did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lane {
    /// The stage, in words.
    pub name: String,
    /// Share of the step in which it ran no action, 0 to 1.
    pub idle: f64,
    /// What it did, one after the other.
    pub bars: Vec<Bar>,
}

/// Something that a stage did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// What kind of thing.
    pub kind: BarKind,
    /// Its name: `F3`.
    pub label: String,
    /// Seconds from the beginning of the step.
    pub begin: f64,
    /// Seconds from the beginning of the step.
    pub end: f64,
}

/// What a bar stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BarKind {
    /// Forward of a micro-batch.
    Forward,
    /// Backward of a micro-batch.
    Backward,
    /// For input, for a turn, for the other stages: a gap in the picture.
    Waiting,
    /// Output given to another stage.
    Exchange,
    /// What comes before an action, and is none.
    Preparation,
    /// End of the step.
    Update,
}

impl BarKind {
    /// Name of its class in the picture and of its category in the trace.
    fn name(self) -> &'static str {
        match self {
            BarKind::Forward => "forward",
            BarKind::Backward => "backward",
            BarKind::Waiting => "waiting",
            BarKind::Exchange => "exchange",
            BarKind::Preparation => "preparation",
            BarKind::Update => "update",
        }
    }
}

/// Left edge of the bars.
const LEFT: f64 = 150.0;
/// Width of a whole step.
const WIDTH: f64 = 1000.0;
/// Room to the right of it, for the shares of idle time.
const RIGHT: f64 = 90.0;
/// Top of the first lane.
const TOP: f64 = 74.0;
/// From one lane to the next.
const LANE: f64 = 38.0;
/// Height of a bar.
const BAR: f64 = 28.0;
/// Width of a character of a bar's label.
const CHARACTER: f64 = 7.0;

/// Colours of both modes. A viewer that knows no media queries shows the first.
const STYLE: &str = "\
svg{background:#fff;font:12px system-ui,sans-serif}\
text{fill:#24292f}.small{fill:#57606a;font-size:11px}.in{fill:#fff;font-size:11px}\
.forward{fill:#2f6fde}.backward{fill:#c2581b}.exchange{fill:#8250df}.preparation{fill:#6e7781}.update{fill:#2da44e}\
.lane{fill:#eaeef2}.axis{stroke:#8c959f}.grid{stroke:#d0d7de;stroke-dasharray:2 3}\
@media(prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#e6edf3}.small{fill:#9da7b1}.in{fill:#fff}\
.lane{fill:#21262d}.axis{stroke:#6e7681}.grid{stroke:#30363d}.forward{fill:#316dca}.backward{fill:#bb5a1c}\
.exchange{fill:#986ee2}.preparation{fill:#768390}.update{fill:#347d39}}";

/// The picture: a lane per stage, in which a gap is time without work.
pub fn svg(timeline: &Timeline) -> String {
    let lanes = timeline.lanes.len() as f64;
    let bottom = TOP + lanes * LANE;
    let (width, height) = (LEFT + WIDTH + RIGHT, bottom + 40.0);
    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n<rect width=\"{width}\" height=\"{height}\" fill=\"none\"/>\n\
         <text x=\"12\" y=\"24\" font-weight=\"600\">{title}</text>\n",
        title = escaped(&timeline.title)
    );
    legend(&mut out);
    axis(&mut out, timeline.seconds, bottom);
    let _ = writeln!(
        out,
        "<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\">idle</text>",
        LEFT + WIDTH + 12.0,
        TOP - 8.0
    );
    let scale = match timeline.seconds > 0.0 {
        true => WIDTH / timeline.seconds,
        false => 0.0,
    };
    for (index, lane) in timeline.lanes.iter().enumerate() {
        draw(&mut out, lane, TOP + index as f64 * LANE, scale);
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String) {
    let entries = [
        (BarKind::Forward, "forward"),
        (BarKind::Backward, "backward"),
        (BarKind::Exchange, "exchange"),
        (BarKind::Preparation, "preparation"),
        (BarKind::Update, "update"),
    ];
    let mut x = LEFT;
    for (class, text) in entries
        .iter()
        .map(|&(kind, text)| (kind.name(), text))
        .chain([("lane", "idle or waiting")])
    {
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"38\" width=\"12\" height=\"12\" rx=\"2\"/>\
             <text class=\"small\" x=\"{:.1}\" y=\"48\">{text}</text>",
            x + 17.0
        );
        x += 34.0 + CHARACTER * text.len() as f64;
    }
}

/// Lines at round times below and behind the lanes.
fn axis(out: &mut String, seconds: f64, bottom: f64) {
    let _ = writeln!(
        out,
        "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{}\" y2=\"{bottom}\"/>",
        LEFT + WIDTH
    );
    let step = round_step(seconds / 8.0);
    if step <= 0.0 {
        return;
    }
    let (unit, factor) = match seconds {
        seconds if seconds < 1e-3 => ("µs", 1e6),
        seconds if seconds < 1.0 => ("ms", 1e3),
        _ => ("s", 1.0),
    };
    let decimals = (-(step * factor).log10().floor()).max(0.0) as usize;
    let ticks = (seconds / step + 1e-9) as usize;
    for tick in 0..=ticks {
        let time = tick as f64 * step;
        let x = LEFT + WIDTH * time / seconds;
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
             <text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.decimals$} \
             {unit}</text>",
            bottom + 18.0,
            time * factor
        );
    }
}

/// The largest of 1, 2 and 5 times a power of ten that is no more than twice `rough`, or so.
fn round_step(rough: f64) -> f64 {
    if !(rough > 0.0 && rough.is_finite()) {
        return 0.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    let multiple = rough / power;
    let round = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|&round| multiple <= round);
    power * round.unwrap_or(10.0)
}

fn draw(out: &mut String, lane: &Lane, top: f64, scale: f64) {
    let middle = top + BAR / 2.0 + 4.0;
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>\
         <rect class=\"lane\" x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{BAR}\"/>\
         <text x=\"{:.1}\" y=\"{middle:.1}\">{:.1} %</text>",
        LEFT - 10.0,
        escaped(&lane.name),
        LEFT + WIDTH + 12.0,
        100.0 * lane.idle,
    );
    for bar in lane.bars.iter().filter(|bar| bar.kind != BarKind::Waiting) {
        let (x, width) = (LEFT + bar.begin * scale, (bar.end - bar.begin) * scale);
        // What is narrower cannot be seen, and there may be thousands of them.
        if width < 0.05 {
            continue;
        }
        let _ = writeln!(
            out,
            "<rect class=\"{}\" x=\"{x:.2}\" y=\"{top}\" width=\"{width:.2}\" height=\"{BAR}\">\
             <title>{} {:.3} ms</title></rect>",
            bar.kind.name(),
            escaped(&bar.label),
            1e3 * (bar.end - bar.begin),
        );
        let number = bar.label.trim_start_matches(['F', 'B']);
        let is_action = matches!(bar.kind, BarKind::Forward | BarKind::Backward);
        if is_action && width >= CHARACTER * number.len() as f64 + 4.0 {
            let _ = writeln!(
                out,
                "<text class=\"in\" x=\"{:.2}\" y=\"{middle:.1}\" text-anchor=\"middle\">{}</text>",
                x + width / 2.0,
                escaped(number),
            );
        }
        if width > 3.0 {
            // A seam, so that neighbours of one colour can be told apart.
            let _ = writeln!(
                out,
                "<rect class=\"lane\" x=\"{:.2}\" y=\"{top}\" width=\"0.8\" height=\"{BAR}\"/>",
                x + width - 0.8
            );
        }
    }
}

/// Text as XML wants it; what XML cannot say at all is left out.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            control if control.is_control() => {}
            other => out.push(other),
        }
    }
    out
}

/// The step as a trace: a JSON array of complete events, which chrome://tracing and Perfetto read (Trace
/// Event Format, Google 2016). Times are in microseconds; a stage is a thread.
pub fn chrome_trace(timeline: &Timeline) -> String {
    let mut events = vec![serde_json::json!({
        "name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": timeline.title},
    })];
    for (stage, lane) in timeline.lanes.iter().enumerate() {
        events.push(serde_json::json!({
            "name": "thread_name", "ph": "M", "pid": 0, "tid": stage, "args": {"name": lane.name},
        }));
        events.extend(lane.bars.iter().map(|bar| {
            serde_json::json!({
                "name": bar.label,
                "cat": bar.kind.name(),
                "ph": "X",
                "ts": 1e6 * bar.begin,
                "dur": 1e6 * (bar.end - bar.begin),
                "pid": 0,
                "tid": stage,
            })
        }));
    }
    let lines: Vec<String> = events.iter().map(ToString::to_string).collect();
    format!("[\n{}\n]\n", lines.join(",\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bar(kind: BarKind, label: &str, begin: f64, end: f64) -> Bar {
        let label = label.to_owned();
        Bar {
            kind,
            label,
            begin,
            end,
        }
    }

    fn example(seconds: f64) -> Timeline {
        let at = |share: f64| share * seconds;
        Timeline {
            title: "two <stages> & \"a step\"\u{1}".to_owned(),
            seconds,
            lanes: vec![
                Lane {
                    name: "stage 0 <cpu>".to_owned(),
                    idle: 0.25,
                    bars: vec![
                        bar(BarKind::Preparation, "prepare", at(0.0), at(0.01)),
                        bar(BarKind::Forward, "F0", at(0.01), at(0.3)),
                        bar(BarKind::Exchange, "give activations", at(0.3), at(0.301)),
                        bar(BarKind::Waiting, "wait for gradients", at(0.301), at(0.5)),
                        bar(BarKind::Backward, "B0", at(0.5), at(0.98)),
                        bar(BarKind::Update, "update", at(0.98), at(1.0)),
                    ],
                },
                Lane {
                    name: "stage 1".to_owned(),
                    idle: 0.0,
                    bars: vec![bar(BarKind::Forward, "F12.1", at(0.3), at(0.300_01))],
                },
            ],
        }
    }

    /// The names of all elements; fails where the text is no XML of elements, attributes and text.
    fn elements(xml: &str) -> Vec<String> {
        let (mut open, mut names) = (Vec::new(), Vec::new());
        let mut rest = xml;
        while let Some(start) = rest.find('<') {
            let text = &rest[..start];
            assert!(!text.contains('>'), "{text}");
            for (place, _) in text.match_indices('&') {
                let entity = &text[place..];
                let known = ["&amp;", "&lt;", "&gt;", "&quot;"];
                assert!(
                    known.iter().any(|known| entity.starts_with(known)),
                    "{entity}"
                );
            }
            let end = start + rest[start..].find('>').unwrap();
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
                continue;
            }
            let whole = tag.strip_suffix('/');
            let (name, mut attributes) = whole.unwrap_or(tag).split_once(' ').unwrap_or((tag, ""));
            while let Some((attribute, value)) = attributes.split_once("=\"") {
                assert!(
                    attribute
                        .trim()
                        .chars()
                        .all(|c| c.is_alphanumeric() || c == '-')
                );
                let (value, more) = value.split_once('"').unwrap();
                assert!(!value.contains(['<', '&']), "{value}");
                attributes = more;
            }
            assert_eq!(attributes.trim(), "", "{tag}");
            names.push(name.to_owned());
            if whole.is_none() {
                open.push(name.to_owned());
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        names
    }

    #[test]
    fn the_picture_is_xml_and_shows_every_lane_to_time() {
        for seconds in [3e-4, 0.25, 7.3, 1234.5] {
            let picture = svg(&example(seconds));
            let names = elements(&picture);
            assert_eq!(names[0], "svg");
            assert!(
                !picture.contains("NaN") && !picture.contains("inf"),
                "{picture}"
            );
            for text in [
                "two &lt;stages&gt; &amp; &quot;a step&quot;<",
                ">stage 0 &lt;cpu&gt;<",
                ">25.0 %<",
                "class=\"forward\" x=\"160.00\" y=\"74\" width=\"290.00\"",
                "class=\"backward\" x=\"650.00\"",
                "text-anchor=\"middle\">0</text>",
            ] {
                assert!(picture.contains(text), "{text}\n{picture}");
            }
            // A gap is nothing that is drawn, and what is too narrow has no number.
            assert!(!picture.contains("wait for") && !picture.contains(">12.1<"));
        }
        elements(&svg(&Timeline {
            title: String::new(),
            seconds: 0.0,
            lanes: Vec::new(),
        }));
    }

    #[test]
    fn ticks_stand_at_round_times() {
        for (rough, round) in [
            (0.9, 1.0),
            (1.1, 2.0),
            (23.0, 50.0),
            (0.051, 0.1),
            (0.0, 0.0),
        ] {
            assert!((round_step(rough) - round).abs() < 1e-12, "{rough}");
        }
        let picture = svg(&example(0.25));
        for text in [">0 ms<", ">50 ms<", ">250 ms<"] {
            assert!(picture.contains(text), "{text}");
        }
    }

    #[test]
    fn the_trace_is_json_of_complete_events() {
        let trace = chrome_trace(&example(2.0));
        let events: Vec<serde_json::Value> = serde_json::from_str(&trace).unwrap();
        let named = |name: &str| events.iter().filter(|event| event["name"] == name).count();
        assert_eq!(named("thread_name"), 2);
        let forward = events.iter().find(|event| event["name"] == "F0").unwrap();
        assert_eq!((&forward["ph"], &forward["tid"]), (&"X".into(), &0.into()));
        assert!((forward["ts"].as_f64().unwrap() - 20_000.0).abs() < 1e-6);
        assert!((forward["dur"].as_f64().unwrap() - 580_000.0).abs() < 1e-6);
        assert_eq!(events.len(), 1 + 2 + 7);
    }
}
