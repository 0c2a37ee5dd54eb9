# What becomes of events whatever central answers: the answer table of the wire,
# row by row.  The whole of it rests on invariant 2 (every event reaches central
# and takes effect there once) and invariant 5 (settled holds nothing else).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $shop = SmShop->new(
	branches => [],
	conf     => join("\n", 'softmobile.retry_interval = 3s', 'softmobile.probe_interval = 1s',
		'softmobile.connect_timeout = 1s', 'softmobile.request_timeout = 2s', ''));
my $node = $shop->node;

# ---------------------------------------------------------------------------
# Faults that fail the batch.  Each has a branch and a central server of its
# own, so that all of them happen at the same time.

my @faults = (
	# name, message, whether central may have taken the events, answer
	[ 'refused',   qr/^offline$/, 0 ],
	[ 'no name',   qr/^offline$/, 0 ],
	[ 'black hole', qr/^offline$/, 0, 'hang', health => 'same' ],
	[ 'trickle',   qr/^offline$/, 0, 'trickle', health => 'same' ],
	[ 'closed',    qr/^offline$/, 0, 'close', health => 'same' ],
	[ 'reset',     qr/^offline$/, 0, 'reset', health => 'same' ],
	[ 'reset after the events were stored', qr/^offline$/, 1, 'lost', health => 'same' ],
	[ 'stored, then silence', qr/^offline$/, 1, 'lost_hang', health => 'same' ],
	(map { [ "http $_", qr/^http $_: no detail given$/, 0, 'status', status => $_ ] }
		400, 401, 403, 404, 405, 408, 409, 418, 422, 425, 429, 451, 500, 502, 503, 599),
	[ 'a problem report', qr/^http 503: closed on Sundays$/, 0, 'problem', status => 503, detail => 'closed on Sundays' ],
	[ 'http 415', qr/^http 415: no detail given$/, 0, 'status', status => 415 ],
	[ 'redirect',  qr/^protocol: http 302 .* redirects are not followed$/, 0, 'redirect', location => 'http://127.0.0.1:1/' ],
	[ 'captive portal', qr/^protocol: /, 0, 'portal' ],
	[ 'empty 200', qr/^protocol: /, 1, 'empty', status => 200 ],
	[ 'empty 204', qr/^protocol: /, 1, 'empty' ],
	[ 'garbage',   qr/^protocol: answer is not HTTP$/, 0, 'raw', bytes => "\x00\x01SSH-2.0-OpenSSH\r\n" ],
	[ 'endless body', qr/^protocol: answer too long$/, 0, 'endless' ],
	[ 'endless headers', qr/^protocol: /, 0, 'endless_head' ],
	[ 'cut',       qr/^protocol: answer cut off$/, 1, 'cut' ],
	[ 'cut by reset', qr/^protocol: answer cut off$/, 1, 'cut_reset' ],
	[ 'cut chunk', qr/^protocol: answer cut off$/, 1, 'cut_chunked' ],
	[ 'cut headers', qr/^protocol: answer cut off$/, 1, 'cut_headers' ],
	(map { [ "lying receipt: $_", qr/^protocol: /, 1, 'lie', how => $_ ] }
		qw(counts negative fraction foreign twice status missing text array)));

my %central;
my @registrations;
foreach my $fault (@faults)
{
	my ($name, undef, undef, $mode, %options) = @$fault;
	my $central = $central{$name} = SmReceiver->new;

	$central->answer($mode, %options) if $mode;
	$central->refuse if $name eq 'refused';
	my $url = $name eq 'no name' ? 'http://central.invalid' : $central->url;
	push @registrations, "SELECT softmobile.register_branch('$name', '$name', '$url')";
}
$shop->change(@registrations);

# Two sales and a change of the first, for each of them.
my @branches = map { $_->[0] } @faults;
$shop->change(
	(map { "INSERT INTO sale VALUES ('$_/1', '$_'), ('$_/2', '$_')" } @branches),
	q{UPDATE sale SET note = 'changed' WHERE id LIKE '%/1'});

foreach my $fault (@faults)
{
	my ($name, $message) = @$fault;

	$shop->fails_with($message, "$name: the message", $name);
}
foreach my $name (grep { $_ ne 'no name' } @branches)
{
	$shop->comes_to(
		"SELECT count(DISTINCT attempt_count) = 1 AND min(attempt_count) >= 1 AND bool_and(last_attempt_at > created_at)
			AND count(*) = 3 AND NOT bool_or(conflict_flag)
			FROM softmobile.sync_outbox WHERE status = 'FAILED' AND branch_id = '$name'",
		't', "$name: attempts are counted");
}
$shop->result_is('SELECT count(*) FROM softmobile.outbox_exception', '0', 'invariant 5: no event is at fault');
$shop->result_is(q{SELECT count(*) FROM softmobile.outbox_lane_state WHERE settled_all <> '{}' AND branch_id IS NOT NULL}, '0',
	'invariant 5: nothing is settled');
$shop->result_is(q{SELECT count(DISTINCT branch_id) FROM softmobile.sync_history WHERE status = 'failed'}, scalar(@faults),
	'every branch has a failed session');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_history WHERE status = 'success'}, '0', '... and no other');

# The faults end, and everything arrives by itself.
foreach my $fault (@faults)
{
	my ($name, undef, $took) = @$fault;
	my $central = $central{$name};

	$central->drop_connections;
	$central->answer('receipt');
	$central->listen;
	$shop->sql("SELECT softmobile.register_branch('$name', '$name', '" . $central->url . "')") if $name eq 'no name';
}
foreach my $fault (@faults)
{
	my ($name, undef, $took) = @$fault;
	my $central = $central{$name};

	$shop->drains("$name: arrives when that is over", $name);
	my @came = map { "$_->{subject} $_->{type}" =~ s{^.*/(.) softmobile.sale.}{$1 }r } $central->events;

	# While a batch is being bisected central may change its mind: other entities can overtake then.
	@came = sort { substr($a, 0, 1) <=> substr($b, 0, 1) } @came if $name =~ /^http (400|422)$/;
	my @expected = $name =~ /^http (400|422)$/ ? ('1 insert', '1 update', '2 insert') : ('1 insert', '2 insert', '1 update');
	is_deeply(\@came, \@expected, "$name: once in effect, in order");
	if ($took)
	{
		cmp_ok($central->duplicates, '>=', 3, "$name: what central had already is known as duplicate");
	}
	else
	{
		is($central->duplicates, 0, "$name: none was sent twice that had arrived");
	}
	my %keys = map { $_->{headers}{'idempotency-key'} => 1 } $central->batches;
	is(scalar(keys %keys), 1, "$name: one Idempotency-Key") unless $name =~ /^http (400|422)$/;
}

# A branch with a new central server, for what follows.
sub branch
{
	my ($name, $mode, %options) = @_;
	my $central = $central{$name} = SmReceiver->new;

	$central->answer($mode, %options) if $mode;
	$shop->sql("SELECT softmobile.register_branch('$name', '$name', '" . $central->url . "')");
	return $central;
}

# ---------------------------------------------------------------------------
# When it is tried again

my $busy = branch('busy', 'status', status => 503, headers => { 'Retry-After' => 5 }, times => 1);
my $held = branch('held', 'status', status => 403, times => 1);
my $conflict = branch('running', 'status', status => 409, times => 2);
$shop->sell($_, "$_-1") foreach qw(busy held running);
$shop->drains("$_: arrives", $_) foreach qw(busy held running);
my @times = map { $_->{time} } $busy->batches;
cmp_ok($times[1] - $times[0], '>=', 4.9, 'Retry-After is honoured, beyond the retry interval');
@times = map { $_->{time} } $held->batches;
cmp_ok($times[1] - $times[0], '>=', 2.5, 'what is held is tried again at the retry interval');
my %keys = map { $_->{headers}{'idempotency-key'} => 1 } $conflict->batches;
is_deeply([ scalar($conflict->batches), scalar(keys %keys) ], [ 3, 1 ], '409: again, with the same Idempotency-Key');

$shop->settled_is_contiguous('invariant 5: settled is contiguous');
$shop->stop;
done_testing();
