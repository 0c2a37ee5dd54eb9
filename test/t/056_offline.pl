# Before a cut: prepare_offline() against a real central and one that answers
# badly, and the items of offline_checklist() that need central, the worker or
# the server's settings, each made to fail.  The others are in sql/offline.sql.

use strict;
use warnings;

use Digest::SHA qw(sha256_hex);
use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmReceiver;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $token_file = "$PostgreSQL::Test::Utils::tmp_check/token";

sub write_token
{
	my ($text) = @_;
	unlink $token_file;
	append_to_file($token_file, "$text\n");
	chmod 0600, $token_file;
	return;
}

write_token(token('b1'));

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['b1'],
	conf     => join("\n", "softmobile.auth_token_file = '$token_file'", 'softmobile.probe_interval = 1s', 'softmobile.connect_timeout = 1s',
		'softmobile.request_timeout = 2s', 'softmobile.retry_interval = 1s', 'softmobile.max_attempts = 2', 'wal_level = replica',
		'max_replication_slots = 4', 'max_prepared_transactions = 4', 'fsync = on', ''));
my $node = $shop->node;

$shop->sql(q{SELECT softmobile.detach('sale'); ALTER TABLE sale ADD folio text, ADD total numeric;
	SELECT softmobile.attach('sale', 'sale', branch_column => 'branch', folio_column => 'folio', amount_column => 'total')});

# The rows of prepare_offline(): step and ok, and what is not ok also with its detail.
sub prepare
{
	my ($branch, $arguments) = @_;
	return $shop->sql("SELECT step, ok, CASE WHEN NOT ok THEN detail END FROM softmobile.prepare_offline('$branch'" . ($arguments // '') . ')');
}

# One item of the checklist: ok and detail.
sub item
{
	my ($code, $branch, $days) = @_;
	return $shop->sql("SELECT ok, detail FROM softmobile.offline_checklist('" . ($branch // 'b1') . "', " . ($days // 7) . ") WHERE code = '$code'");
}

# The codes of what is not ok.
sub faults
{
	my ($branch, $days) = @_;
	return $shop->sql("SELECT string_agg(code, ' ' ORDER BY code) FROM softmobile.offline_checklist('" . ($branch // 'b1') . "', " . ($days // 7) . ') WHERE NOT ok');
}

sub set
{
	my (@settings) = @_;
	$node->safe_psql('postgres', "ALTER SYSTEM SET $_") foreach @settings;
	$node->reload;
	return;
}

# A setting of the server is this in sessions that begin now: a test.
sub comes_into_force
{
	my ($name, $value) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $shop->comes_to("SELECT current_setting('$name')", $value, "$name = $value");
}

# ---------------------------------------------------------------------------
# Central offers a catalogue for all and a POS configuration for this branch

my $catalogue = q{ [ {"sku": "TEL-1", "name": "Teléfono ñandú €", "price": 10.50} ] };
$central->safe_psql('postgres', qq{SELECT softmobile.central_set_reference('catalogue', '$catalogue');
	SELECT softmobile.central_set_reference('pos_config', '{"printer":"caja 1"}', 'b1');
	SELECT softmobile.central_set_reference('pos_config', '{"printer":"caja 2"}', 'b2')});
$shop->sell('b1', 'S-1', 'S-2');
is(prepare('b1'), join("\n", map { "$_|t|" } 'sync', 'queue', 'conflicts', 'reference', 'reference catalogue', 'reference pos_config'), 'prepared');
is(received('true'), 2, '... the sales are at central');
$shop->result_is(
	q{SELECT name, content::text, bytes = octet_length(content::text), digest = encode(sha256(convert_to(content::text, 'UTF8')), 'hex'), central_updated_at <= pulled_at
		FROM softmobile.reference_data WHERE branch_id = 'b1' ORDER BY name},
	"catalogue|$catalogue|t|t|t\npos_config|{\"printer\":\"caja 1\"}|t|t|t", '... each document of this branch, byte for byte');
$shop->result_is(q{SELECT branch_id, ok, json_array_length(steps) FROM softmobile.offline_preparation}, 'b1|t|6', '... recorded');
$shop->result_is(q{SELECT branch_id, details->>'ok', jsonb_array_length(details->'steps') FROM softmobile.sync_audit WHERE action = 'prepare_offline'}, 'b1|true|6', '... audited');

my $versions = q{SELECT name, pulled_at FROM softmobile.reference_data ORDER BY name};
my $pulled = $shop->sql($versions);
my $checked = $shop->sql('SELECT min(checked_at) FROM softmobile.reference_data');
is(prepare('b1'), join("\n", map { "$_|t|" } 'sync', 'queue', 'conflicts', 'reference', 'reference catalogue', 'reference pos_config'), 'prepared again');
$shop->result_is($versions, $pulled, '... what has not changed is not pulled');
$shop->result_is("SELECT min(checked_at) > '$checked' FROM softmobile.reference_data_status", 't', '... but known to be current');

$central->safe_psql('postgres', q{SELECT softmobile.central_set_reference('catalogue', '[]'); SELECT softmobile.central_set_reference('pos_config', '{}', 'b1')});
is(prepare('b1', q{, resources => '{catalogue, customers}'}), "sync|t|\nqueue|t|\nconflicts|t|\nreference|t|\nreference catalogue|t|\nreference customers|f|Central does not offer it.",
	'what is asked for by name');
$shop->result_is('SELECT name, content FROM softmobile.reference_data ORDER BY name', "catalogue|[]\npos_config|{\"printer\":\"caja 1\"}", '... and nothing else');
is(prepare('b1', q{, resources => '{}'}), "sync|t|\nqueue|t|\nconflicts|t|\nreference|t|", 'no reference data at all');

my $holder = $node->background_psql('postgres');
$holder->query_safe(q{SELECT pg_advisory_lock(softmobile.prepare_lock_class(), hashtext('b1'))});
my ($result, $out, $error) = $node->psql('postgres', q{\set VERBOSITY sqlstate
SELECT * FROM softmobile.prepare_offline('b1')});
like($error, qr/55P03/, 'nobody prepares a branch twice at a time');
$holder->quit;
($result, $out, $error) = $node->psql('postgres', q{\set VERBOSITY sqlstate
SELECT * FROM softmobile.prepare_offline('b1', timeout => '0')});
like($error, qr/22023/, 'a timeout that is none');
($result, $out, $error) = $node->psql('postgres', q{\set VERBOSITY sqlstate
BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM softmobile.prepare_offline('b1')});
like($error, qr/25001/, 'a snapshot that could not see the result');

($result, $out, $error) = $node->psql('postgres', q{\set VERBOSITY sqlstate
BEGIN READ ONLY; SELECT * FROM softmobile.prepare_offline('b1')});
like($error, qr/25006/, 'nothing to be written');

# ---------------------------------------------------------------------------
# All is well

$shop->sql(q{SELECT softmobile.prepare_offline('b1'), softmobile.confirm_printer('b1', 'caja 1'), softmobile.record_backup('pg_dump')});
is(faults(), '', 'a branch that is ready has nothing left to do');
like(item('token'), qr/^t\|Central accepts it for this branch/, 'the token is valid');
like(item('certificate'), qr/^t\|None is needed/, 'no TLS on this machine');
like(item('clock'), qr/^t\|It agrees/, 'one clock');
like(item('disk'), qr/^t\|\d+ \w+ free; 7 days at the present rate \([1-9]\d* \w+ a day\)/, 'the disk has a rate');

# ---------------------------------------------------------------------------
# What the server is to blame for

set(q{max_wal_size = '1000TB'}, 'full_page_writes = off');
comes_into_force('full_page_writes', 'off');
is(faults(), 'disk durability', 'no disk for so much, and no protection from torn pages');
set('max_wal_size = DEFAULT', 'full_page_writes = DEFAULT');
$shop->sql(q{SELECT pg_create_physical_replication_slot('hq', true)});
is(item('wal'), 'f|Kept without limit for unused replication slots: hq.', 'WAL that a slot keeps');
$shop->sql(q{SELECT pg_drop_replication_slot('hq')});
set(q{softmobile.retention = '20d'});
comes_into_force('softmobile.retention', '20d');
is(faults(), 'retention', 'delivered events are kept too briefly');
is(faults('b1', 6), '', '... not for a shorter cut');
set('softmobile.retention = DEFAULT', q{softmobile.central_backup_window = '24d'});
comes_into_force('softmobile.retention', '30d');
is(faults(), 'retention', '... nor if central can be set back further');
set('softmobile.central_backup_window = DEFAULT', 'softmobile.enable_transfers = off');
comes_into_force('softmobile.enable_transfers', 'off');
is(faults(), 'flag_transfers', 'a flag that is off');
$node->wait_for_log(qr/WARNING:.*softmobile: changes of transfers are not captured/);
$node->reload;
set('softmobile.enable_transfers = on');
comes_into_force('softmobile.enable_transfers', 'on');
is(scalar(() = slurp_file($node->logfile) =~ /changes of transfers are not captured/g), 1, '... is in the log, once');

# What stands for long.
set(q{softmobile.sync_interval = '1s'});
comes_into_force('softmobile.sync_interval', '1s');
my $forgetful = $node->background_psql('postgres');
$forgetful->query_safe(q{BEGIN; SELECT 1});
$shop->comes_to(q{SELECT ok FROM softmobile.offline_checklist('b1') WHERE code = 'transactions'}, 'f', 'a transaction left open');
like(item('transactions'), qr/^f\|Open: process \d+ since /, '... says whose');
$forgetful->query_safe('COMMIT');
$shop->comes_to(q{SELECT ok FROM softmobile.offline_checklist('b1') WHERE code = 'transactions'}, 't', '... until it ends');
$forgetful->query_safe(q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale (id, branch) VALUES ('S-3', 'b1'); PREPARE TRANSACTION 'orphan'});
$shop->comes_to(q{SELECT detail ~ '^Open: prepared transaction ''orphan'' since ' FROM softmobile.offline_checklist('b1') WHERE code = 'transactions'}, 't', 'a prepared transaction');
$forgetful->query_safe(q{COMMIT PREPARED 'orphan'});
$forgetful->quit;
set('softmobile.sync_interval = DEFAULT');
comes_into_force('softmobile.sync_interval', '30min');

# ---------------------------------------------------------------------------
# Central refuses

write_token('another');
like(item('token'), qr/^f\|Central answered 401/, 'a token that is not valid');
like(prepare('b1'), qr/^reference\|f\|There is no list of what central offers: central answered 401.*What was pulled before stays\.$/m, '... nor is there reference data');
$shop->result_is('SELECT count(*) FROM softmobile.reference_data', 2, '... what is there stays');
write_token(token('b2'));
like(item('token'), qr/^f\|Central answered 403/, 'a token of another branch');
unlink $token_file;
like(item('link'), qr/^f\|configuration: /, 'no token file');
write_token(token('b1'));
$shop->drains('all arrives once the token is right again');

# Central holds another version of a row.
$central->safe_psql('postgres', q{UPDATE softmobile.central_projection SET row = row || '{"note":"headquarters"}' WHERE entity_id = 'S-1'});
$shop->change(q{UPDATE sale SET note = 'branch' WHERE id = 'S-1'});
$shop->comes_to(q{SELECT count(*) FROM softmobile.sync_outbox WHERE conflict_flag}, 1, 'a conflict');
like(item('conflicts'), qr/^f\|Events in conflict with what central holds: 1/, '... on the checklist');
like(prepare('b1'), qr/^conflicts\|f\|Events in conflict with what central holds: 1\.$/m, '... and in the preparation');

# ---------------------------------------------------------------------------
# A central that answers badly, and one that is not there

my $receiver = SmReceiver->new;
$shop->sql(q{SELECT softmobile.register_branch('r1', 'Receiver', '} . $receiver->url . q{')});

# What GET /reference says of documents: name => content, or [announced bytes, announced content, what comes].
sub offer
{
	my (%documents) = @_;
	my @list;

	while (my ($name, $document) = each %documents)
	{
		my ($bytes, $announced, $comes) = ref $document ? @$document : (length $document, $document, $document);
		push @list, { name => $name, bytes => $bytes, digest => sha256_hex($announced), updated_at => '2026-01-31T10:00:00Z' };
		$receiver->route("GET /reference/$name", body => $comes) unless ref $comes;
		$receiver->route("GET /reference/$name", %$comes) if ref $comes;
	}
	$receiver->route('GET /reference', body => { resources => \@list });
	return;
}

# What a pull of one document comes to.
sub pull
{
	my ($name) = @_;
	return (grep { /^reference $name/ } split(/\n/, prepare('r1')))[0] // '';
}

offer(doc => '{"version":1}');
is(pull('doc'), 'reference doc|t|', 'a document');
my $held = q{SELECT content, pulled_at FROM softmobile.reference_data WHERE branch_id = 'r1' AND name = 'doc'};
my $before = $shop->sql($held);

offer(doc => [ 13, '{"version":2}', { body => '{"version":2}', cut => 6 } ]);
like(pull('doc'), qr/^reference doc\|f\|It did not arrive: .*\. The version of .* stays\.$/, 'half a document');
offer(doc => [ 13, '{"version":2}', '{"version":3}' ]);
like(pull('doc'), qr/^reference doc\|f\|What arrived is not what central's list says\. The version of .* stays/, 'another than announced');
offer(doc => '<html>welcome</html>');
like(pull('doc'), qr/^reference doc\|f\|What arrived is not JSON\. The version of .* stays/, 'no JSON');
offer(doc => '[' x 100_000);
like(pull('doc'), qr/^reference doc\|f\|What arrived is not JSON\. The version of .* stays/, '... nor this');
offer(doc => [ 13, '{"version":2}', { status => 500, body => '{"version":2}' } ]);
like(pull('doc'), qr/^reference doc\|f\|Central answered 500\. The version of .* stays/, 'a fault at central');
set(q{softmobile.reference_max_size = '10kB'});
comes_into_force('softmobile.reference_max_size', '10kB');
my $large = '"' . 'x' x 20_000 . '"';
offer(doc => $large);
$receiver->forget_requests;
like(pull('doc'), qr/^reference doc\|f\|It has 20 kB; softmobile\.reference_max_size is 10 kB\. The version of .* stays/, 'over the limit');
is(scalar($receiver->requests(path => '/reference/doc')), 0, '... is not even asked for');
offer(doc => [ 13, $large, $large ]);
like(pull('doc'), qr/^reference doc\|f\|It did not arrive: .*\. The version of .* stays/, '... nor taken if central says that it is small');
set('softmobile.reference_max_size = DEFAULT');
$receiver->answer('status', status => 503);
$shop->sell('r1', 'R-1');
offer(doc => [ 13, '{"version":2}', { status => 404 } ], new => '"ñ"');
like(prepare('r1'), qr/^sync\|f\|The synchronisation failed: http 503.*^queue\|f\|Events waiting: 0, failed: 1.*^reference new\|t\|/ms, 'a step that fails keeps no other from being made');
$shop->result_is($held, $before, 'the document is still the one that arrived');
$shop->result_is(q{SELECT ok FROM softmobile.offline_preparation ORDER BY id DESC LIMIT 1}, 'f', 'what was not in order is recorded as such');

$receiver->route('GET /reference', body => '<html>welcome</html>', type => 'text/html');
like(prepare('r1'), qr/^reference\|f\|There is no list of what central offers: central's answer is not JSON/m, 'a captive portal');
like(item('token', 'r1'), qr/^f\|Not known: what answered is not central's list/, '... says nothing of the token');
like(item('link', 'r1'), qr/^t\|/, '... while what is asked for its health is central');
$receiver->answer('raw', health => 'same', bytes => "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: 18\r\n\r\n<html>hello</html>");
is(item('link', 'r1'), 'f|What answered is a web page, not central.', 'a portal that answers everything');
like(item('token', 'r1'), qr/^f\|Not known: central did not answer/, '... nothing is known of the token');
$receiver->answer('status', status => 503);
$receiver->route('GET /reference', body => { resources => 'none' });
like(prepare('r1'), qr/^reference\|f\|Central's list of reference data cannot be read\.$/m, 'a list that is none');
$receiver->route('GET /reference', body => { resources => [ { name => 'doc', bytes => 'many', digest => '' } ] });
like(prepare('r1'), qr/^reference\|f\|Central's list of reference data cannot be read\.$/m, 'a size that is none');
$receiver->route('GET /reference', body => { resources => [ { name => '../x', bytes => 2, digest => 'a' x 64 }, { name => 'doc' }, 7 ] });
like(prepare('r1'), qr/^reference\|f\|(Central offers no reference data\. Entries of its list that cannot be used|Central's list of reference data cannot be read)/m, 'names that are none');
$receiver->route('GET /reference', status => 404);
like(prepare('r1'), qr/^reference\|f\|There is no list of what central offers: central answered 404/m, 'a central that offers none');

# The token where central cannot be asked about it: what it has accepted counts.
like(item('token', 'r1'), qr/^f\|Not known: this central cannot be asked/, 'nothing known of the token');

# What failed and is not tried again: central asks for patience.
$receiver->answer('status', status => 503, headers => { 'Retry-After' => 3600 });
$shop->sql(q{SELECT softmobile.requeue_failed_outbox_entries('r1', '0')});
$shop->comes_to(q{SELECT count(*) FROM softmobile.offline_checklist('r1') WHERE code IN ('failed', 'retries', 'previous_sync') AND NOT ok}, 3, 'events that have failed');
like(item('retries', 'r1'), qr/^f\|Events that are FAILED for longer than the retry interval: 1: http 503/, '... say why');
$receiver->answer('reject', subjects => { 'R-1' => 'no such product' });
$shop->sql(q{SELECT softmobile.requeue_failed_outbox_entries('r1', '0')});
$shop->comes_to(q{SELECT detail ~ ': 1, 1 of them for good, after softmobile.max_attempts' FROM softmobile.offline_checklist('r1') WHERE code = 'retries'}, 't', 'an event that central rejects');
$receiver->answer('receipt');
$shop->sql(q{SELECT softmobile.sync_outbox_retry((SELECT array_agg(id) FROM softmobile.sync_outbox WHERE status = 'FAILED' AND branch_id = 'r1'), 'corrected at headquarters')});
$shop->drains('a retry by hand', 'r1');
like(item('token', 'r1'), qr/^t\|Central accepted events (\d+ seconds|a moment) ago/, 'central has accepted events with this token');
$shop->comes_to(q{SELECT count(*) FROM softmobile.offline_checklist('r1') WHERE code IN ('failed', 'retries') AND NOT ok}, 0, '... and all is well');

# The clock.
$receiver->answer('raw', health => 'same', bytes => "HTTP/1.1 200 OK\r\nDate: Tue, 06 Jan 2015 10:00:00 GMT\r\nContent-Length: 2\r\n\r\nok");
like(item('clock', 'r1'), qr/^f\|It is \d+ days ahead of central's/, 'a clock that is wrong');
$receiver->answer('receipt');

# TLS: certificates for two days.
my ($certificates, $files) = SmReceiver->make_certificates;
my $secure = SmReceiver->new(tls => { cert => $files->{cert}, key => $files->{key} });
$shop->sql(q{SELECT softmobile.register_branch('t1', 'TLS', '} . $secure->url . q{'), softmobile.register_branch('h1', 'HTTP', 'http://central.invalid')});
like(item('certificate', 't1'), qr/^f\|It does not verify: /, 'a certificate of nobody known');
like(item('link', 't1'), qr/^f\|tls: /, '... makes no link');
set("softmobile.ca_file = '$files->{ca}'");
comes_into_force('softmobile.ca_file', $files->{ca});
is(item('certificate', 't1', 1), 't|Days left: 1.', 'a certificate that lasts for a day');
is(item('certificate', 't1', 7), 'f|Days left: 1.', '... but not for a week');
is(item('certificate', 'h1'), 'f|The link is not encrypted.', 'no TLS over a line');

# The link.
$receiver->refuse;
like(item('link', 'r1'), qr/^f\|offline: /, 'no link');
like(item('token', 'r1'), qr/^f\|Not known: central did not answer/, '... so that nothing is known of the token');
like(item('clock', 'r1'), qr/^f\|Not known: central did not answer/, '... nor of the clock');
like(prepare('r1'), qr/^sync\|f\|The synchronisation failed: offline.*^reference\|f\|There is no list of what central offers: central cannot be reached/ms, 'no preparation without link');
$shop->result_is($held, $before, '... keeps what was there');
like(item('sync_after', 'r1'), qr/^f\|No session has succeeded since one failed/, 'a cut');
$shop->sell('r1', 'R-3');
$receiver->listen;
$shop->drains('all arrives after it', 'r1');
$shop->sql(q{SELECT softmobile.sync_run('r1')});
like(item('sync_after', 'r1'), qr/^t\|All that was captured before .* has arrived/, '... and is known to have arrived');

# ---------------------------------------------------------------------------
# Without the library, and with an archive that takes nothing

$node->append_conf('postgresql.conf', "shared_preload_libraries = ''\narchive_mode = on\narchive_command = 'false'");
$node->restart;
$shop->sql('SELECT pg_switch_wal()');
$shop->comes_to(q{SELECT detail ~ '^archive_command fails since ' FROM softmobile.offline_checklist('b1') WHERE code = 'wal' AND NOT ok}, 't', 'WAL that is not archived');
like(item('preload'), qr/^f\|softmobile is not in shared_preload_libraries/, 'not preloaded');
like(item('worker'), qr/^f\|The library is not in shared_preload_libraries/, '... no worker');
like(prepare('b1'), qr/^sync\|f\|softmobile is not preloaded.*^reference catalogue\|t\|/ms, '... the preparation says so, and does the rest');
stop_gateway($gateway);
$shop->stop;
done_testing();
