//! Throughput over time as a picture: SVG, one strip for each stage, each as high as its own peak: some stages come in bursts.
//!
//! ```text
//! host xcp1 read        ▁▃▅▇▇▇▇▆▇▇▇▇▇▂▁   31.2 MiB/s   peak 36 MiB/s    busy 94 %
//! repository main sync  ▁▁▁▁▁▁▁▁▁▁▁▁▁▁█   30.9 MiB/s   peak 1 GiB/s      busy 2 %
//!                       0 s    5 s   10 s
//! ```

use std::fmt::Write as _;
use std::time::Duration;

use super::page::Escaped;
use super::text::{percent, place, speed, time};
use crate::cli::text::Shown;
use crate::job::figures::{Strip, rate};

/// Parts of the time, each a step of the line.
pub const PARTS: usize = 120;
/// The lengths of the picture, in its own units.
const WIDTH: u32 = 960;
const LABEL: u32 = 230;
const FIGURES: u32 = 310;
const STRIP: u32 = 30;
const GAP: u32 = 8;
const AXIS: u32 = 24;

/// Draws strips over a time, oldest to the left; nothing if nothing passed.
pub fn draw(strips: &[Strip], length: Duration) -> String {
    let strips: Vec<&Strip> = strips.iter().filter(|strip| strip.bytes.iter().any(|bytes| *bytes > 0)).collect();
    if strips.is_empty() {
        return String::new();
    }
    let rows = u32::try_from(strips.len()).unwrap_or(u32::MAX);
    let height = rows.saturating_mul(STRIP + GAP).saturating_add(AXIS);
    let title = format!("Throughput over {}", time(length));
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n", Escaped(&title));
    axis(&mut svg, length, height - AXIS);
    for (row, strip) in (0..rows).zip(&strips) {
        draw_strip(&mut svg, strip, row * (STRIP + GAP), length);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Draws the line of time below the strips.
fn axis(svg: &mut String, length: Duration, bottom: u32) {
    let span = WIDTH - LABEL - FIGURES;
    for quarter in 0..=4 {
        let x = LABEL + span * quarter / 4;
        let anchor = ["start", "middle", "middle", "middle", "end"][usize::try_from(quarter).unwrap_or(0)];
        let (grid, at, y) = (bottom - GAP / 2, time(length * quarter / 4), bottom + 14);
        // Writing to a String cannot fail.
        let _ = writeln!(svg, "<line class=\"grid\" x1=\"{x}\" y1=\"0\" x2=\"{x}\" y2=\"{grid}\"/>");
        let _ =
            writeln!(svg, "<text class=\"axis\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>", Escaped(&at));
    }
}

fn draw_strip(svg: &mut String, strip: &Strip, top: u32, length: Duration) {
    let (bottom, span) = (top + STRIP, WIDTH - LABEL - FIGURES);
    let highest = strip.bytes.iter().copied().max().unwrap_or(0);
    // In tenths, so that nothing is rounded to whole units.
    let x = |part: usize| tenths(u128::from(LABEL) * 10 + u128::from(span) * 10 * part as u128 / PARTS as u128);
    let y = |bytes: u64| {
        let (highest, bottom) = (u128::from(highest.max(1)), u128::from(bottom) * 10);
        tenths(bottom.saturating_sub((u128::from(STRIP) * 10 * u128::from(bytes) + highest / 2) / highest))
    };
    let mut path = format!("M{LABEL} {bottom}");
    let mut before = String::new();
    for (part, bytes) in strip.bytes.iter().enumerate() {
        let y = y(*bytes);
        if y != before {
            let along = if part > 0 { format!("H{}", x(part)) } else { String::new() };
            let _ = write!(path, "{along}V{y}");
            before = y;
        }
    }
    let _ = write!(path, "H{}V{bottom}Z", WIDTH - FIGURES);
    let class = if strip.limited > 0 { "strip slow" } else { "strip" };
    let of = place(&strip.of, strip.pool.as_deref());
    let whole = format!("{}, {of}", strip.stage);
    let (name, of) = (cut(&strip.stage, 12), cut(&of, 30));
    let (middle, left) = (top + STRIP / 2 + 5, LABEL - 10);
    let _ = writeln!(svg, "<g class=\"{class}\"><title>{}</title>", Escaped(&whole));
    let _ = writeln!(
        svg,
        "<text x=\"{left}\" y=\"{middle}\" text-anchor=\"end\"><tspan class=\"of\">{}</tspan> {}</text>",
        Escaped(&of),
        Escaped(&name)
    );
    let _ = writeln!(
        svg,
        "<line class=\"base\" x1=\"{LABEL}\" y1=\"{bottom}\" x2=\"{}\" y2=\"{bottom}\"/>",
        WIDTH - FIGURES
    );
    let _ = writeln!(svg, "<path d=\"{path}\"/>");
    let peak = rate(highest, length / u32::try_from(PARTS).unwrap_or(u32::MAX));
    let figures = [
        (95, speed(rate(strip.total, length))),
        (215, format!("peak {}", speed(peak))),
        (FIGURES - 4, format!("busy {}", percent(strip.times.shares().busy))),
    ];
    for (offset, text) in figures {
        let x = WIDTH - FIGURES + offset;
        let _ = writeln!(
            svg,
            "<text class=\"number\" x=\"{x}\" y=\"{middle}\" text-anchor=\"end\">{}</text>",
            Escaped(&text)
        );
    }
    svg.push_str("</g>\n");
}

/// Writes tenths with a point.
fn tenths(number: u128) -> String {
    let (whole, part) = (number / 10, number % 10);
    if part == 0 { whole.to_string() } else { format!("{whole}.{part}") }
}

/// Cuts what has no room, as long as it is when it is shown.
fn cut(text: &str, longest: usize) -> String {
    let text = Shown(text).to_string();
    if text.chars().count() <= longest {
        return text;
    }
    text.chars().take(longest.saturating_sub(1)).chain(['…']).collect()
}
