# Delivery when nothing is wrong: what is sent to whom, in which order, and what
# the shop's server says about it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $central = SmReceiver->new;
my $second = SmReceiver->new;

my $shop = SmShop->new(
	url      => $central->url,
	branches => [1],
	conf     => "softmobile.retry_interval = 600\n");
my $node = $shop->node;

sub subjects { return join(' ', map { $_->{subject} } $_[0]->events); }

# A setting of the database: the worker starts anew for it.
sub alter_database
{
	my ($change) = @_;
	my $pid = $shop->worker_pid;

	$shop->sql("ALTER DATABASE postgres $change");
	$node->poll_query_until('postgres', "SELECT running AND pid <> $pid FROM softmobile.worker_status()");
	return;
}

# What the next POST carries is gathered while the branch is not active.
sub in_one_go
{
	my ($branch, $name, $receiver, @changes) = @_;

	$shop->sql("SELECT softmobile.register_branch('$branch', '$name', active => false)");
	$shop->change(@changes);
	$receiver->forget_requests;
	$shop->sql("SELECT softmobile.register_branch('$branch', '$name')");
	return;
}

# ---------------------------------------------------------------------------
# The wire, to the letter

in_one_go(1, 'Centro', $central,
	q{INSERT INTO draft VALUES ('D-1', 1, 'low')},
	q{INSERT INTO customer VALUES ('C-1', 1, 'normal')},
	q{INSERT INTO sale VALUES ('S-1', 1, 'Ñandú "x"')},
	q{UPDATE sale SET note = 'changed' WHERE id = 'S-1'},
	q{DELETE FROM sale WHERE id = 'S-1'});
$central->wait_for_events(5);
is(subjects($central), 'S-1 S-1 S-1 C-1 D-1', 'HIGH goes before NORMAL before LOW');
$shop->drains('all is SENT');

my @batches = $central->batches;
is(scalar(@batches), 3, 'a batch for each lane');
my %h = %{ $batches[0]{headers} };
is($h{'content-type'}, 'application/cloudevents-batch+json; charset=UTF-8', 'Content-Type');
is($h{'content-encoding'}, 'gzip', 'Content-Encoding');
is($h{'user-agent'}, 'softmobile/1.0', 'User-Agent');
like($h{'idempotency-key'}, qr/^"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"$/,
	'Idempotency-Key is a quoted string, as its draft has it');
is($h{'x-reason'}, 'Sincronizaci%C3%B3n%20autom%C3%A1tica', 'X-Reason is percent-encoded UTF-8');
like($h{traceparent}, qr/^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$/, 'traceparent');
ok(!exists $h{authorization}, 'no Authorization without a token');
is(scalar(grep { exists $_->{expect} } map { $_->{headers} } @batches), 0, 'no Expect');
my %keys = map { $_->{headers}{'idempotency-key'} => 1 } @batches;
is(scalar(keys %keys), 3, 'each batch has a key of its own');

my ($insert, $update, $delete) = $central->events;
my $user = $shop->sql('SELECT current_user');
my $row = sub { return { id => 'S-1', branch => '1', note => $_[0] }; };
my $epoch = $shop->sql('SELECT epoch FROM softmobile.outbox_epoch WHERE registered');
is_deeply(
	$insert,
	{
		specversion     => '1.0',
		id              => $shop->sql("SELECT id FROM softmobile.sync_outbox WHERE entity_id = 'S-1' AND operation = 'insert'"),
		source          => '/branches/1',
		type            => 'softmobile.sale.insert',
		subject         => 'S-1',
		time            => $insert->{time},
		datacontenttype => 'application/json',
		sequence        => '1',
		lane            => 'high',
		epoch           => $epoch,
		epochno         => $insert->{epochno},
		reason          => 'venta normal',
		actor           => $user,
		data            => { new => $row->("\x{d1}and\x{fa} \"x\"") }
	},
	'an insert');
like($insert->{time}, qr/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$/, 'time is RFC 3339 in UTC');
like($insert->{id}, qr/^[0-9a-f]{8}-[0-9a-f]{4}-7/, 'id is a UUID version 7');
like($batches[0]{body}, qr/"sequence":"1"/, 'sequence is a string');
is($update->{type}, 'softmobile.sale.update', 'an update');
is_deeply($update->{data}, { new => $row->('changed'), old => { note => "\x{d1}and\x{fa} \"x\"" } },
	'... carries the new row, and the old values of what was changed');
is($delete->{type}, 'softmobile.sale.delete', 'a delete');
is_deeply($delete->{data}, { old => $row->('changed') }, '... carries the old row');

# Retries of a batch

$central->answer('status', status => 503, headers => { 'Retry-After' => 0 }, times => 2);
$central->forget_requests;
$shop->sell(1, 'S-2');
$central->wait_for_requests(3);
@batches = $central->batches;
%keys = map { $_->{headers}{'idempotency-key'} => 1 } @batches;
is(scalar(keys %keys), 1, 'each retry of a batch has the same Idempotency-Key');
my @trace = map { [ split('-', $_->{headers}{traceparent}) ] } @batches;
is_deeply([ map { $_->[1] } @trace ], [ ($trace[0][1]) x 3 ], '... the same trace');
my %parents = map { $_->[2] => 1 } @trace;
is(scalar(keys %parents), 3, '... and another parent each time');
$shop->drains('it arrives');
$shop->result_is(
	"SELECT attempt_count, last_attempt_at IS NOT NULL, error_message IS NULL FROM softmobile.sync_outbox WHERE entity_id = 'S-2'",
	'3|t|t', 'SENT tells the attempts');

# Compression off

$node->append_conf('postgresql.conf', "softmobile.compression = none\n");
$node->reload;
$node->poll_query_until('postgres', "SELECT current_setting('softmobile.compression') = 'none'");
$central->wait_for(
	sub {
		$shop->sql(q{BEGIN; SET LOCAL softmobile.reason = 'venta normal';
			INSERT INTO customer VALUES ('plain', 1) ON CONFLICT (id) DO UPDATE SET note = customer.note || '.'; COMMIT});
		$shop->{node}->poll_query_until('postgres', "SELECT count(*) = 0 FROM softmobile.sync_outbox WHERE status <> 'SENT'");
		return !exists(($central->batches)[-1]{headers}{'content-encoding'});
	},
	'a body that is not compressed');
pass('compression = none');

# ---------------------------------------------------------------------------
# Branches and their central servers

$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $second->url('/api/v1/') . "')");
$shop->sell(2, 'N-1');
$second->wait_for(sub { $_[0]->requests(method => 'POST', path => '/api/v1/events') }, 'a batch');
is(scalar(grep { $_->{path} !~ m{^/api/v1/(events|verify)$} } $second->requests), 0, 'a URL with a prefix and a slash at its end');
$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $second->url . "/')");
$second->wait_for_events(1);
$shop->drains('a changed URL is tried at once', 2);
is(($second->events)[0]{source}, '/branches/2', 'a branch has its own central server');

# A sink that sends no receipts

$second->answer('empty');
$shop->sell(2, 'N-2');
$shop->fails_with(qr/^protocol: /, 'an empty 2xx is no receipt', 2);
$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $second->url . "', receipts => 'none')");
$shop->drains('receipts none: an empty 2xx settles', 2);
$second->answer('receipt');
$shop->sell(2, 'N-3');
$shop->drains('... and so does a receipt', 2);
$second->answer('portal');
$shop->sell(2, 'N-4');
$shop->fails_with(qr/^protocol: /, '... but nothing else does', 2);
$second->answer('receipt');
$shop->drains('it arrives later', 2);

# Inactive branches

$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $second->url . "', active => false)");
$shop->sell(2, 'N-5');
$shop->sell(1, 'S-3');
$shop->drains('another branch goes on', 1);
$shop->result_is(
	"SELECT status, attempt_count, last_attempt_at, error_message FROM softmobile.sync_outbox WHERE entity_id = 'N-5'",
	'PENDING|0||', 'an event of an inactive branch is PENDING');
$shop->sql("SELECT softmobile.register_branch('2', 'Norte', '" . $second->url . "', active => true)");
$shop->drains('it goes when the branch is active', 2);
is(subjects($second), 'N-1 N-2 N-3 N-4 N-5', 'all of it in order');

# Branches nobody registered

$shop->sell('Süd "4"', 'U-1', 'U-2');
$shop->drains('a branch met for the first time', 'Süd "4"');
is((grep { $_->{subject} eq 'U-1' } $central->events)[0]{source}, '/branches/S%C3%BCd%20%224%22',
	'its source is a URI');
$shop->result_is("SELECT name, registered_by, active FROM softmobile.branch WHERE branch_id = 'Süd \"4\"'",
	'Süd "4"|first sight|t', 'it is registered');
$shop->sell('Süd "4"', 'U-3');
$shop->change("UPDATE sale SET note = 'x' WHERE id = 'U-1'");
$shop->drains('it sells on', 'Süd "4"');
is(join(' ', map { "$_->{subject}.$_->{type}" =~ s/softmobile.sale.//r } grep { $_->{subject} =~ /^U-/ } $central->events),
	'U-1.insert U-2.insert U-3.insert U-1.update', '... in order');

# Somebody is registering the branch, and thinks better of it
my $registering = $node->background_psql('postgres');
$registering->query_safe(q{BEGIN; SELECT softmobile.register_branch('6', 'Oeste')});
$shop->sell(6, 'O-1');
$shop->sell(1, 'S-6');
$shop->drains('a sale of a branch that is just being registered is in nobody\'s way', 1);
$registering->query_safe('ROLLBACK');
$registering->quit;
$shop->drains('... and is sent', 6);

# No URL, then one: ALTER DATABASE is enough

$shop->sql("ALTER DATABASE postgres SET softmobile.central_url = ''");
$node->poll_query_until('postgres',
	"SELECT status = 'failed' FROM softmobile.sync_run('1', '10 s')");
$shop->result_is("SELECT status, error_message FROM softmobile.sync_run('1')",
	'failed|softmobile.central_url is not set', 'without a central_url sync_run() says so');
$shop->sell(1, 'S-4');
$shop->result_is("SELECT status FROM softmobile.sync_run('1')", 'failed', '... with something to send, too');
$shop->result_is(
	"SELECT status, attempt_count, error_message FROM softmobile.sync_outbox WHERE entity_id = 'S-4'",
	'PENDING|0|', 'events stay PENDING');
my $third = SmReceiver->new;
$shop->sql("ALTER DATABASE postgres SET softmobile.central_url = '" . $third->url . "'");
$third->wait_for_events(1);
is(subjects($third), 'S-4', 'ALTER DATABASE SET softmobile.central_url is obeyed');
$shop->drains('all is sent');
alter_database('RESET softmobile.central_url');

# One dead central server does not delay another branch's

$second->answer('hang', health => 'same');
$shop->sell(2, 'N-6');
$second->wait_for(sub { grep { $_->{mode} && $_->{mode} eq 'hang' } $second->batches });
$shop->sell(1, "S-5");
$shop->drains('a branch goes on while another one\'s central hangs', 1);
$shop->result_is("SELECT status FROM softmobile.sync_outbox WHERE entity_id = 'N-6'", 'PENDING', 'which is still waiting');
$second->answer('receipt');
$second->drop_connections;
$shop->drains('when it is back, it gets its events', 2);

# ---------------------------------------------------------------------------
# Rows that were there before

$shop->sql(q{CREATE TABLE device (id int PRIMARY KEY, name text);
	INSERT INTO device SELECT i, 'device ' || i FROM generate_series(1, 1000) i});
alter_database(q{SET softmobile.branch_id = '1'});
$central->forget_requests;
$shop->sql(q{SELECT softmobile.attach('device', 'device', priority => 'HIGH', initial => 'snapshot')});
$shop->comes_to("SELECT count(*) FROM softmobile.sync_outbox WHERE entity_type = 'device' AND branch_id = '1'", 1000,
	'existing rows are queued, for the branch of the session that attached the table');
$shop->change(q{INSERT INTO device VALUES (1001, 'new')}, q{UPDATE device SET name = 'changed' WHERE id = 7});
$shop->comes_to(q{SELECT count(DISTINCT entity_id), count(*) FILTER (WHERE status <> 'SENT')
	FROM softmobile.sync_outbox WHERE entity_type = 'device'}, '1001|0', 'existing rows and new ones are sent');
my @device = grep { $_->{type} =~ /device/ } $central->events;
my @snapshot = grep { $_->{snapshot} } @device;
cmp_ok(scalar(@snapshot), '>=', 1000, 'every existing row');
is_deeply([ grep { $_->{lane} ne 'low' || $_->{type} ne 'softmobile.device.insert' } @snapshot ], [],
	'... as an insert in the LOW lane');
is_deeply([ map { $_->{type} =~ s/softmobile.device.//r } grep { $_->{subject} eq '7' } @device ], [qw(insert update)],
	'... before what happens to it later');

# ---------------------------------------------------------------------------
# Sessions

$shop->result_is(
	q{SELECT mode, status, finished_at IS NOT NULL, triggered_by, error_message FROM softmobile.sync_history WHERE branch_id = '1' ORDER BY id DESC LIMIT 1},
	'automatic|success|t|softmobile worker|', 'an automatic session');
my $sessions = $shop->sql("SELECT count(*) FROM softmobile.sync_history WHERE branch_id = '1'");
foreach my $i (1 .. 5)
{
	$shop->sell(1, "T-$i");
	$shop->drains("sale $i of a trickle", 1);
}
$shop->result_is("SELECT count(*) FROM softmobile.sync_history WHERE branch_id = '1'", $sessions,
	'a trickle of sales is one session');

$shop->sql("SELECT softmobile.register_branch('5', 'Este')");
$shop->result_is(
	"SELECT branch_id, mode, status, triggered_by, processed_events, differences_detected, error_message FROM softmobile.sync_run('5')",
	"5|manual|success|$user|0|0|", 'a run with nothing to send');
in_one_go(5, 'Este', $central,
	q{SELECT softmobile.register_branch('5', 'Este', active => false)},
	q{INSERT INTO sale SELECT 'E-' || i, '5' FROM generate_series(1, 10) i});
$shop->result_is(
	"SELECT mode, status, processed_events IN (0, 10) FROM softmobile.sync_run('5')",
	'manual|success|t', 'a run with something to send');
$shop->result_is("SELECT sum(processed_events) FROM softmobile.sync_history WHERE branch_id = '5'", '10',
	'sessions count each event once');
$shop->result_is("SELECT count(*) FROM softmobile.sync_outbox WHERE branch_id = '5' AND status = 'SENT'", '10',
	'all is SENT when a run is over');

# A session for which somebody gives a reason; the batch is at its end when the run begins.
$shop->sql("SELECT softmobile.register_branch('5', 'Este', '" . $second->url . "')");
$second->answer('status', status => 503, headers => { 'Retry-After' => 600 });
$shop->sell(5, 'E-11');
$shop->fails_with(qr/^http 503: /, 'a batch that waits', 5);
$second->answer('receipt');
$shop->result_is(
	q{SET softmobile.reason = 'cierre de caja ñ'; SELECT status, processed_events FROM softmobile.sync_run('5')},
	'success|1', 'a run does not wait');
is(($second->batches)[-1]{headers}{'x-reason'}, 'cierre%20de%20caja%20%C3%B1', 'X-Reason is the caller\'s');
$shop->result_is(q{SELECT reason FROM softmobile.sync_session WHERE branch_id = '5' ORDER BY id DESC LIMIT 1},
	'cierre de caja ñ', '... and kept with the session');

# ---------------------------------------------------------------------------
# Order of an entity's events

foreach my $i (1 .. 20)
{
	$shop->change("INSERT INTO customer VALUES ('K', 1, '$i') ON CONFLICT (id) DO UPDATE SET note = '$i'",
		"INSERT INTO customer VALUES ('K-$i', 1, '')");
}
$shop->drains('changes of one row');
is_deeply([ map { $_->{data}{new}{note} } grep { $_->{subject} eq 'K' } $central->events ], [ 1 .. 20 ],
	'an entity\'s events arrive in order');

# ---------------------------------------------------------------------------
# Tokens

my $token = $node->basedir . '/token';
sub write_token
{
	my ($text, $mode) = @_;

	open(my $fh, '>', "$token.new") or die "$token: $!";
	print $fh $text;
	close($fh);
	chmod($mode // 0600, "$token.new");
	rename("$token.new", $token) or die "$token: $!";
	return;
}

sub authorization { return (reverse map { $_->{headers}{authorization} // '' } $central->batches)[0]; }

$node->append_conf('postgresql.conf', "softmobile.auth_token_file = '$token'\n");
$node->reload;
$node->poll_query_until('postgres', "SELECT current_setting('softmobile.auth_token_file') <> ''");
$shop->result_is("SELECT status, error_message ~ '^token: ' FROM softmobile.sync_run('1') WHERE status = 'failed'", '',
	'nothing to send, nothing wrong');
$shop->sell(1, 'A-1');
$shop->fails_with(qr/^token: the file does not exist$/, 'no token file');
write_token("geheim-first\n");
$shop->drains('a token file appears: tried at once');
is(authorization(), 'Bearer geheim-first', 'a newline at its end is not part of a token');
write_token('');
$shop->sell(1, 'A-2');
$shop->fails_with(qr/^token: the file is empty$/, 'an empty token file');
write_token('geheim-second', 0604);
$shop->fails_with(qr/^token: the file can be read .* by everybody/, 'a token for everybody\'s eyes')
  if $node->poll_query_until('postgres',
	"SELECT count(*) > 0 FROM softmobile.sync_outbox WHERE error_message LIKE '%everybody%'");
write_token('geheim-second');
$shop->drains('chmod 600: tried at once');
is(authorization(), 'Bearer geheim-second', 'a token without a newline');
write_token("two\nlines\n");
$shop->sell(1, 'A-3');
$shop->fails_with(qr/^token: the file holds more than one token$/, 'more than one token');
write_token('geheim-third');
$shop->drains('a new token: tried at once');
$central->answer('status', status => 401);
$shop->sell(1, 'A-4');
$shop->fails_with(qr/^http 401: /, 'a token that central does not know');
$central->answer('receipt');
write_token('geheim-fourth');
$shop->drains('a new token after 401: tried at once');
is(authorization(), 'Bearer geheim-fourth', '... with it');
ok(!$node->log_contains(qr/Bearer|geheim/), 'no token in the log');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox x WHERE x::text ~ 'geheim'}, '0', 'no token in a view');
$node->append_conf('postgresql.conf', "softmobile.auth_token_file = ''\nsoftmobile.compression = gzip\n");
$node->reload;

# ---------------------------------------------------------------------------
# Many

in_one_go(1, 'Centro', $central,
	q{INSERT INTO sale SELECT 'M-' || i, '1', repeat('x', 50) FROM generate_series(1, 20000) i});
$shop->drains('20,000 events');
is(scalar(grep { $_->{subject} =~ /^M-/ } $central->events), 20000, 'all of them arrived');
is($central->duplicates, 0, 'none twice');
cmp_ok(scalar($central->batches), '<=', 60, 'in few requests (' . scalar($central->batches) . ')');
$shop->settled_is_contiguous('settled is one range');

# What follows a batch is ready before that is answered; still no urgent event waits for more of a long queue than that.
$node->append_conf('postgresql.conf', 'softmobile.batch_max_events = 100');
$node->reload;
$central->answer('receipt', delay => 0.03);
my $before = scalar($central->events);
in_one_go(1, 'Centro', $central, q{INSERT INTO draft SELECT 'L-' || i, '1', 'low' FROM generate_series(1, 6000) i});
$central->wait_for_events($before + 500);
$shop->sell(1, 'urgent');
my $already = scalar($central->batches);
$shop->drains('a long queue, and something urgent');
my @requests = $central->batches;
my ($place) = grep { $requests[$_]{body} =~ /"urgent"/ } 0 .. $#requests;
cmp_ok($place - $already, '<=', 2, 'HIGH goes before all but what is on its way, and what follows that');
my @order = map { $_->{subject} } $central->events;
is(join(' ', grep { /^L-/ } @order), join(' ', map { "L-$_" } 1 .. 6000), 'a lane goes by number, whatever is sent ahead of settling');
is($central->duplicates, 0, '... and nothing twice');
$shop->settled_is_contiguous('... and settled is one range');

$shop->stop;
done_testing();
