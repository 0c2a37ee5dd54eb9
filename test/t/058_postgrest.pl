# The operating procedure over HTTP, as PostgREST would run it: before, during and
# after a cut, everything through two roles that have nothing but what grant_role()
# gives and the shop's own tables: the till (app) and the manager (operator).  The
# reason comes in the X-Reason header.  Every call's answer, and every error, is JSON.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmPostgrest;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $port = $gateway->{port};
my $token_file = PostgreSQL::Test::Utils::tempdir() . '/token';
append_to_file($token_file, token('b1') . "\n");
chmod 0600, $token_file;

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$port",
	branches => ['b1'],
	conf     => join("\n", "softmobile.auth_token_file = '$token_file'", 'softmobile.probe_interval = 1s', 'softmobile.connect_timeout = 1s',
		'softmobile.request_timeout = 5s', 'softmobile.max_attempts = 1', ''));
my $api = SmPostgrest->new($shop->node, 'postgres', [qw(till manager)]);

$shop->sql(q{
	CREATE TABLE ticket (id bigint PRIMARY KEY, branch text, folio text, total numeric(12, 2), sold_at timestamptz DEFAULT now());
	CREATE TABLE stock (sku text PRIMARY KEY, branch text, quantity integer);
	SELECT softmobile.attach('ticket', 'sale_return', branch_column => 'branch', folio_column => 'folio', amount_column => 'total', date_column => 'sold_at'),
		softmobile.attach('stock', 'inventory', branch_column => 'branch', sku_column => 'sku', quantity_column => 'quantity'),
		softmobile.grant_role('till', 'app'), softmobile.grant_role('manager', 'operator');
	GRANT SELECT, INSERT, UPDATE ON ticket, stock TO till, manager});
$central->safe_psql('postgres', q{SELECT softmobile.central_set_reference('catalogue', '[{"sku": "TEL-1", "name": "Teléfono ñandú €", "price": 10.50}]')});

# Fields of rows (or of one row), as text: to compare with.
sub fields
{
	my ($answer, @names) = @_;
	my $body = $answer->{body};

	return "status $answer->{status}: " . ($answer->{text} // 'nothing') if $answer->{status} != 200;
	return join("\n", map { my $row = $_; join('|', map { my $value = $row->{$_}; JSON::PP::is_bool($value) ? ($value ? 't' : 'f') : $value // '' } @names) } ref $body eq 'ARRAY' ? @$body : $body);
}

# A request that fails: its HTTP status, SQLSTATE and message; with a hint.
sub fails
{
	my ($answer, $expected, $name, $hint) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $error = $answer->{body};

	is(ref $error eq 'HASH' ? join(' ', $answer->{status}, $error->{code}, $error->{message} // '') : $answer->{text}, $expected, $name);
	like(ref $error eq 'HASH' ? $error->{hint} // '' : '', $hint, '... and says what to do') if defined $hint;
	return;
}

sub sell
{
	my ($first, $last, %row) = @_;
	my $answer = $api->insert('till', 'ticket', [ map { { id => $_, branch => 'b1', folio => sprintf('A-%04d', $_), total => 10 + $_, %row } } $first .. $last ], 'x-reason' => 'venta de mostrador');

	return $answer->{status} == 200 ? scalar @{ $answer->{body} } : $answer->{text};
}

sub cut { stop_gateway($gateway); return; }
sub reconnect { $gateway = start_gateway('--listen', "127.0.0.1:$port"); return; }

# ---------------------------------------------------------------------------
# Every function that a web layer may call has names for its arguments, and
# returns what JSON can carry.

my $callable = q{FROM pg_proc p WHERE p.pronamespace = 'softmobile'::regnamespace
	AND obj_description(p.oid, 'pg_proc') !~ '^Internal' AND (has_function_privilege('till', p.oid, 'EXECUTE') OR has_function_privilege('manager', p.oid, 'EXECUTE'))};
$shop->result_is("SELECT p.oid::regprocedure $callable AND (p.pronargs > 0 AND (p.proargnames IS NULL OR '' = ANY (p.proargnames)) OR p.provariadic <> 0)", '',
	'all arguments have names');
$shop->result_is("SELECT p.oid::regprocedure $callable AND (p.prorettype = 'record'::regtype AND p.proargmodes IS NULL
	OR EXISTS (SELECT FROM unnest(p.proallargtypes || p.proargtypes::oid[] || p.prorettype) AS a JOIN pg_type t ON t.oid = a
		WHERE t.typtype = 'p' AND t.typname NOT IN ('record', 'void') OR t.typname IN ('refcursor', 'bytea', 'char', 'name', 'regclass')))", '',
	'all of them return rows or values of types that JSON has, or that it writes as text');
$shop->result_is(q{SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
	WHERE c.relnamespace = 'softmobile'::regnamespace AND a.attnum > 0 AND has_column_privilege('till', c.oid, a.attnum, 'SELECT')
		AND format_type(a.atttypid, NULL) !~ '^(text|bigint|integer|smallint|boolean|numeric|jsonb?|uuid|date|interval|timestamp with time zone|int8multirange)(\[\])?$'}, '',
	'so are the columns that the till reads');

# ---------------------------------------------------------------------------
# Reasons

fails($api->insert('till', 'ticket', { id => 1, branch => 'b1', folio => 'A-0001', total => 11 }),
	'400 23514 X-Reason required: at least 5 characters', 'a sale without X-Reason', qr/reason/i);
fails($api->insert('till', 'ticket', { id => 1, branch => 'b1', folio => 'A-0001', total => 11 }, 'x-reason' => '  abc '),
	'400 23514 X-Reason required: at least 5 characters', 'a sale with too short a one');
is(sell(1, 3), 3, 'sales with one');
is($api->call('till', 'current_reason', {}, 'x-reason' => ' devolución del día ')->{body}, 'devolución del día', 'current_reason()');
is($api->call('till', 'set_reason', { reason => 'apertura de caja' })->{status}, 204, 'set_reason()');
fails($api->call('till', 'set_reason', { reason => 'no' }), '400 23514 X-Reason required: at least 5 characters', 'set_reason(), too short');
fails($api->call('till', 'set_reason', { reason => undef }), '400 22004 reason must not be NULL', 'set_reason(null)');
is($api->call('till', 'set_reason', { motive => 'apertura' })->{status}, 404, 'an argument of another name');

# ---------------------------------------------------------------------------
# Before the cut

is(fields($api->call('till', 'sync_run', { branch => 'b1' }, 'x-reason' => 'antes del corte'), qw(branch_id mode status error_message)), 'b1|manual|success|', 'sync_run(branch)');
is(fields($api->call('till', 'sync_run', {}), qw(branch_id status)), 'b1|success', 'sync_run()');
is(fields($api->call('till', 'sync_run', { branch => 'b1', timeout => '10 s' }), qw(branch_id status)), 'b1|success', 'sync_run(branch, timeout)');
fails($api->call('till', 'sync_run', { branch => 'b7' }), '400 42704 branch "b7" does not exist', 'sync_run() of an unknown branch', qr/b1|register_branch/);
fails($api->call('till', 'sync_run', { branch => 'b1', timeout => 'soon' }), '400 22007 invalid input syntax for type interval: "soon"', 'sync_run() with a timeout that is none');
is(fields($api->get('till', 'sync_outbox_stats', q{branch_id = 'b1'}), qw(branch_id entity_type priority total pending failed conflicts)), 'b1|sale_return|HIGH|3|0|0|0', 'sync_outbox_stats');
is(fields($api->get('till', 'sync_overview'), qw(branch_id link_state percent pending failed conflicts)), 'b1|up|100|0|0|0', 'sync_overview');
is(fields($api->get('till', 'sync_history', q{branch_id = 'b1' ORDER BY id DESC LIMIT 1}), qw(branch_id mode status triggered_by)), 'b1|manual|success|till', 'sync_history');

is(fields($api->call('till', 'prepare_offline', { branch => 'b1' }, 'x-reason' => 'corte programado'), qw(step ok)),
	"sync|t\nqueue|t\nconflicts|t\nreference|t\nreference catalogue|t", 'prepare_offline()');
is($api->get('till', 'reference_data', q{name = 'catalogue'})->{body}[0]{content}[0]{name}, 'Teléfono ñandú €', 'reference_data');
is(fields($api->get('till', 'reference_data_status'), qw(branch_id name)), 'b1|catalogue', 'reference_data_status');
is(fields($api->call('till', 'confirm_printer', { branch => 'b1', printer => 'caja 1' }), qw(branch_id printer confirmed_by)), 'b1|caja 1|till', 'confirm_printer()');
fails($api->call('till', 'confirm_printer', { branch => 'b1', printer => ' ' }), '400 22023 printer needs a name', 'confirm_printer() of none', qr/./);
my $checklist = $api->call('till', 'offline_checklist', { branch => 'b1' });
is(scalar(grep { !defined $_->{item} || !defined $_->{detail} || !JSON::PP::is_bool($_->{ok}) } @{ $checklist->{body} }), 0, 'offline_checklist()');
is(join(' ', sort map { $_->{code} } grep { !$_->{ok} && $_->{code} =~ /^(worker|queue|conflicts|link|printer|reference|preparation)/ } @{ $checklist->{body} }), '', '... all of it well');
fails($api->call('till', 'offline_checklist', { branch => 'b1', days => 0 }), '400 22023 days must be between 1 and 3650', 'offline_checklist() for no days', qr/./);

# ---------------------------------------------------------------------------
# During

cut();
is(sell(4, 6), 3, 'sales without a link');
is($api->insert('till', 'stock', { sku => 'TEL-1', branch => 'b1', quantity => 10 }, 'x-reason' => 'ajuste de inventario')->{status}, 200, 'an adjustment');
$shop->fails_with(qr/^offline$/, 'the link is down');
$shop->comes_to(q{SELECT string_agg(status, ' ' ORDER BY entity_id) FROM softmobile.sync_outbox WHERE status <> 'SENT'}, 'FAILED FAILED FAILED PENDING', 'a batch has failed');
my $queue = 'id, branch_id, entity_type, entity_id, operation, status, priority, attempt_count, last_attempt_at, error_message, reason';
is(fields($api->get('till', 'sync_outbox', q{status = 'FAILED' ORDER BY created_at, id LIMIT 1}, $queue), qw(entity_type entity_id operation status priority error_message reason)),
	'sale_return|4|insert|FAILED|HIGH|offline|venta de mostrador', 'sync_outbox, as the till sees it');
fails($api->get('till', 'sync_outbox', 'true', 'id, payload'), '403 42501 permission denied for view sync_outbox', '... without what the events say');
is($api->get('manager', 'sync_outbox', q{entity_id = '4'})->{body}[0]{payload}{new}{folio}, 'A-0004', 'sync_outbox, as the manager sees it');
is(fields($api->call('manager', 'sync_outbox_page', { status => 'FAILED', page_size => 1 }), qw(entity_id status error_message)), '4|FAILED|offline', 'sync_outbox_page()');
fails($api->call('manager', 'sync_outbox_page', { status => 'LOST' }), '400 22023 unknown status "LOST"', '... of no such status', qr/PENDING/);
is(fields($api->get('till', 'sync_overview'), qw(branch_id link_state pending_amount)), 'b1|down|45', 'sync_overview');
like($api->call('till', 'sync_explain', { folio => 'A-0005' })->{body}, qr/^Receipt A-0005 .*out of reach/, 'sync_explain()');
like($api->call('till', 'sync_explain', { folio => 'A-0001', branch => 'b1' })->{body}, qr/^Receipt A-0001 .*headquarters/, '... of one that has arrived');
like($api->call('till', 'sync_explain', { folio => 'A-9999' })->{body}, qr/A-9999 is in no attached table/, '... of one that there is not');
is(fields($api->get('till', 'folio_control', q{entity_type = 'sale_return'}), qw(branch_id series first last count gaps duplicates total)), 'b1|A-|A-0001|A-0006|6|0|0|81', 'folio_control');
is(fields($api->call('till', 'folio_control_of', { branch => 'b1', from => '2020-01-01', to => '2099-12-31' }), qw(series count)), 'A-|6', 'folio_control_of()');
is($api->call('till', 'ledger_of', { lane => 1, seq => 1 })->{status}, 200, 'ledger_of()');
is(join(' ', @{ $api->call('till', 'numbers_of', { numbers => '{[1,3),[7,8)}' })->{body} }), '1 2 7', 'numbers_of()');
is($api->call('till', 'worker_status', {})->{body}{running}, JSON::PP::true, 'worker_status()');
is(fields($api->call('till', 'sync_run', { branch => 'b1' }), qw(status error_message)), 'failed|offline', 'sync_run() without a link');
fails($api->call('till', 'verify_delivery', { branch => 'b1' }), '503 08006 central cannot be reached: could not connect: Connection refused', 'verify_delivery() without a link', qr/./);
fails($api->call('till', 'reconcile', { branch => 'b1', from => '2026-01-01', to => '2036-01-01' }), '503 08006 central cannot be reached: could not connect: Connection refused', 'reconcile() without a link', qr/./);

# ---------------------------------------------------------------------------
# After: retries

my $failed = $api->get('till', 'sync_outbox', q{status = 'FAILED' ORDER BY created_at, id}, $queue)->{body};
my $ids = [ map { $_->{id} } @$failed ];
fails($api->call('till', 'sync_outbox_retry', { ids => $ids }), '400 23514 X-Reason required: at least 5 characters', 'a retry without a reason', qr/./);
fails($api->call('till', 'sync_outbox_retry', { ids => [], reason => 'ya hay enlace' }), '400 22023 no event ids given', 'a retry of nothing', qr/./);
fails($api->call('till', 'sync_outbox_retry', { ids => ['00000000-0000-7000-8000-000000000000'], reason => 'ya hay enlace' }),
	'500 P0002 there is no event 00000000-0000-7000-8000-000000000000', 'a retry of an unknown event', qr/sync_outbox/);
fails($api->call('till', 'sync_outbox_retry', { ids => ['A-0004'], reason => 'ya hay enlace' }), '400 22P02 invalid input syntax for type uuid: "A-0004"', 'a retry of what is no id');
my $retried = $api->call('till', 'sync_outbox_retry', { ids => $ids }, 'x-reason' => 'ya hay enlace');
is(fields($retried, qw(status attempt_count error_message last_attempt_at payload)), join("\n", ('PENDING|0|||') x 3), 'a retry, with the reason in the header');
is(fields($api->get('manager', 'sync_audit', q{action = 'retry'}), qw(reason events current_user_name session_user_name)), 'ya hay enlace|3|till|authenticator', '... audited');
$shop->fails_with(qr/^offline$/, 'tried in vain');
like($api->call('till', 'requeue_failed_outbox_entries', { branch => 'b1', min_age => '0' })->{body}, qr/^\d+$/, 'requeue_failed_outbox_entries()');
like($api->call('till', 'requeue_failed_outbox_entries', {})->{body}, qr/^\d+$/, '... of all branches');
fails($api->call('till', 'requeue_failed_outbox_entries', { min_age => '-1 h' }), '400 22023 min_age must not be negative', '... of the future', qr/./);

reconnect();
$shop->drains('everything arrives');
is(fields($api->call('till', 'sync_run', { branch => 'b1' }, 'x-reason' => 'después del corte'), qw(mode status)), 'manual|success', 'sync_run() once more');
is(fields($api->get('till', 'sync_outbox_stats', 'true ORDER BY entity_type'), qw(entity_type total pending failed)), "inventory|1|0|0\nsale_return|6|0|0", 'the queue is empty');
fails($api->call('till', 'sync_outbox_retry', { ids => [ $ids->[0] ], reason => 'una vez más' }), "500 55000 event $ids->[0] has been sent", 'a retry of what has been sent', qr/resend/);

# ---------------------------------------------------------------------------
# Nothing was lost

my $proof = $api->call('till', 'verify_delivery', { branch => 'b1' });
is(join(' ', map { $_->{equal} ? 'equal' : 'different' } @{ $proof->{body} }), join(' ', ('equal') x @{ $proof->{body} }), 'verify_delivery()');
my ($high) = grep { $_->{lane} eq 'high' && $_->{sent} ne '{}' } @{ $proof->{body} };
is($high->{sent}, $high->{received}, '... sets of numbers are text');

fails($api->call('manager', 'resend', { branch => 'b1', lane => 'high', seqs => '{}', reason => 'central restaurado' }), '400 22023 no numbers to resend', 'resend() of nothing', qr/verify_delivery/);
fails($api->call('manager', 'resend', { branch => 'b1', lane => 'high', seqs => 'all', reason => 'central restaurado' }), '400 22P02 malformed multirange literal: "all"', 'resend() of what is no set');
fails($api->call('till', 'resend', { branch => 'b1', lane => 'high', seqs => '{[1,3)}', reason => 'central restaurado' }), '403 42501 permission denied for function resend', 'resend() by the till');
is($api->call('manager', 'resend', { branch => 'b1', lane => 'high', seqs => '{[1,3)}', reason => undef, epoch => $high->{epoch} }, 'x-reason' => 'central restaurado')->{body}, 2, 'resend() by the manager');
$shop->drains('what is sent again');

# ---------------------------------------------------------------------------
# Reconciliation

my %year = (branch => 'b1', from => '2020-01-01', to => '2099-12-31');
is_deeply($api->call('till', 'reconcile', \%year)->{body}, [], 'reconcile(): no difference');
fails($api->call('till', 'reconcile', { branch => 'b1', from => '2026-02-01', to => '2026-01-01' }), '400 22023 the first day is after the last', 'reconcile() with dates reversed', qr/Exchange/);
fails($api->call('till', 'reconcile', { branch => 'b1', from => '2026-02-30', to => '2026-03-01' }), '400 22008 date/time field value out of range: "2026-02-30"', 'reconcile() from a day that there is not');
$central->safe_psql('postgres', q{SELECT softmobile.central_change('b1', 'sale_return', '3', (SELECT row || '{"total": 99.50}' FROM softmobile.central_projection WHERE entity_type = 'sale_return' AND entity_id = '3'), 'corrected at headquarters')});
my $found = $api->call('till', 'reconcile', \%year);
is(fields($found, qw(kind entity_type entity_id folio status)), 'different|sale_return|3|A-0003|open', 'reconcile(): a difference');
is("$found->{body}[0]{local}{total} $found->{body}[0]{central}{total}", '13.00 99.50', '... side by side');
my $discrepancy = $found->{body}[0]{id};
is(fields($api->get('till', 'sync_discrepancy', q{status = 'open'}), qw(id kind)), "$discrepancy|different", 'sync_discrepancy');
fails($api->call('till', 'resolve_discrepancy', { id => $discrepancy }), '400 23514 X-Reason required: at least 5 characters', 'resolve_discrepancy() without a reason', qr/./);
is(fields($api->call('till', 'resolve_discrepancy', { id => $discrepancy }, 'x-reason' => 'nota de crédito'), qw(id status resolved_by reason)), "$discrepancy|resolved|till|nota de crédito",
	'resolve_discrepancy()');
is($api->call('till', 'resolve_discrepancy', { id => $discrepancy, reason => 'otra vez más' })->{body}{code}, '55000', '... of a resolved one');

# ---------------------------------------------------------------------------
# A conflict: headquarters had changed the row that the till now changes

is($api->update('till', 'ticket', 'ticket.id = 3', { total => 14 }, 'x-reason' => 'precio corregido')->{status}, 200, 'a change of the same row');
$shop->comes_to('SELECT count(DISTINCT id) FROM softmobile.sync_conflicts', 1, 'a conflict');
my $conflict = $api->get('manager', 'sync_conflicts', q{field = 'total'});
is(fields($conflict, qw(branch_id entity_type entity_id operation field old_value local_value central_value)), 'b1|sale_return|3|update|total|13.00|14.00|99.50', 'sync_conflicts');
my $id = $conflict->{body}[0]{id};
is($api->get('till', 'sync_conflicts')->{body}{code}, '42501', '... not for the till');
fails($api->call('till', 'resolve_conflict', { id => $id, resolution => 'local', reason => 'vale lo nuestro' }), '403 42501 permission denied for function resolve_conflict', 'resolve_conflict() by the till');
fails($api->call('manager', 'resolve_conflict', { id => $id, resolution => 'both', reason => 'vale lo nuestro' }), '400 22023 unknown resolution "both"', 'resolve_conflict() both ways', qr/local/);
is(fields($api->call('manager', 'resolve_conflict', { id => $id, resolution => 'central', reason => undef }, 'x-reason' => 'vale lo de la central'), qw(id resolution table_name change)),
	"$id|central|public.ticket|update", 'resolve_conflict() by the manager');
fails($api->call('manager', 'resolve_conflict', { id => $id, resolution => 'central', reason => 'otra vez más' }), "500 55000 the conflict of event $id is resolved already", '... once', qr/./);
$shop->drains('the decision arrives');
is_deeply($api->call('till', 'reconcile', \%year)->{body}, [], 'branch and central are equal again');

# ---------------------------------------------------------------------------
# What else a manager does, and what neither may

like($api->call('manager', 'metrics', {})->{body}, qr/^# (TYPE|HELP|UNIT) softmobile_.*^# EOF$/ms, 'metrics()');
is(fields($api->call('manager', 'record_backup', { kind => 'base', place => 'disco 2' }), qw(kind place)), 'base|disco 2', 'record_backup()');
is($api->call('manager', 'forget_printer', { branch => 'b1', printer => 'caja 1' })->{status}, 204, 'forget_printer()');
is($api->call('manager', 'register_branch', { branch_id => 'b2', name => 'Norte' })->{status}, 204, 'register_branch()');
fails($api->call('manager', 'register_branch', { branch_id => 'b2', name => 'Norte', central_url => 'ftp://x' }), '400 22023 invalid central_url for branch "b2"', '... with a URL that is none', qr/https/);
is(fields($api->get('manager', 'branch', 'true ORDER BY branch_id'), qw(branch_id name active)), "b1|Branch b1|t\nb2|Norte|t", 'branch');
cut();
is(sell(7, 7), 1, 'a sale');
$shop->fails_with(qr/^offline$/, '... that waits');
fails($api->call('manager', 'register_branch', { branch_id => 'b1', name => 'Branch b1', active => JSON::PP::false }),
	'500 55006 cannot deactivate branch "b1" while 1 event is undelivered (amount: 17.00)', 'deactivating a branch', qr/sync_run\('b1'\)/);
is($api->call($_, 'attach', { table => 'ticket', entity_type => 'sale' })->{body}{code}, '42501', "$_: attach()") foreach qw(till manager);
is($api->call($_, 'detach', { table => 'ticket' })->{body}{code}, '42501', "$_: detach()") foreach qw(till manager);
is($api->call($_, 'attach_softmobile', {})->{body}{code}, '42501', "$_: attach_softmobile()") foreach qw(till manager);
is($api->call($_, 'grant_role', { role => $_, kind => 'operator' })->{body}{code}, '42501', "$_: grant_role()") foreach qw(till manager);
is($api->insert('till', 'softmobile.outbox_event_1', { seq => 1 }, 'x-reason' => 'hecho a mano')->{body}{code}, '42501', 'nobody edits the queue by hand');
is($api->update('manager', 'softmobile.outbox_lane', 'true', { status => 'idle' }, 'x-reason' => 'hecho a mano')->{body}{code}, '42501', '... nor its state');
is($api->call('authenticator', 'sync_run', {})->{body}{code}, '42501', 'who has become nobody may do nothing');

$shop->result_is("SELECT p.proname $callable AND p.proname <> ALL ('{" . join(',', $api->called) . "}')", '', 'every function that they may call was called');
$shop->stop;
$central->stop;
done_testing();
