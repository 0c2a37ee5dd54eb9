# What a store manager is told of a receipt while it goes from the till to headquarters, and what the platform's tables
# become there.

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
my $shop = SmShop->new(
	url      => $central->url,
	branches => [7],
	conf     => join("\n", 'softmobile.retry_interval = 2s', 'softmobile.probe_interval = 1s', 'softmobile.connect_timeout = 1s',
		'softmobile.request_timeout = 2s', 'softmobile.max_attempts = 100', "timezone = 'UTC'", ''));
my $time = '[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} UTC';

$shop->sql(q{
	CREATE TABLE ventas (id_venta integer PRIMARY KEY, sucursal_id integer, folio text, total numeric, fecha timestamptz DEFAULT now());
	CREATE TABLE detalle_ventas (id_detalle integer PRIMARY KEY, venta_id integer REFERENCES ventas, sucursal_id integer, producto_id integer, cantidad integer)});
is($shop->sql(q{SELECT string_agg(table_name, ' ') FROM softmobile.attach_softmobile() WHERE attached}), 'public.ventas public.detalle_ventas', 'the platform is attached');

sub sell
{
	my ($id, $folio) = @_;
	return $shop->change("INSERT INTO ventas VALUES ($id, 7, '$folio', 100); INSERT INTO detalle_ventas VALUES ($id, $id, 7, 4, 1)");
}

# What is told of a receipt becomes this, sooner or later.
sub comes_to_be_told
{
	my ($folio, $told, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	(my $pattern = quotemeta($told)) =~ s/\\<time\\>/$time/g;
	$pattern =~ s/\\<n\\>/[0-9]+/g;
	$shop->node->poll_query_until('postgres', "SELECT softmobile.sync_explain('$folio') ~ \$\$^$pattern\$\$", 't');
	return like($shop->sql("SELECT softmobile.sync_explain('$folio')"), qr/^$pattern/, $name);
}

sell(1, 'A-1');
comes_to_be_told('A-1', 'Receipt A-1 (sale 1 of branch 7) is at headquarters: it was delivered at <time> in batch <n>.', 'delivered');

$central->refuse;
sell(2, 'A-2');
comes_to_be_told('A-2',
	'Receipt A-2 (sale 2 of branch 7) has waited since <time>: headquarters have been out of reach since <time>, and it is sent by itself as soon as they answer.', 'no link');
sell(3, 'A-3');
comes_to_be_told('A-3',
	'Receipt A-3 (sale 3 of branch 7) has waited since <time>: headquarters have been out of reach since <time>, and it is sent by itself as soon as they answer.',
	'no link, in no batch yet');
$shop->change('UPDATE ventas SET total = 90 WHERE id_venta = 1');
comes_to_be_told('A-1', 'Receipt A-1 (sale 1 of branch 7) is at headquarters: it was delivered at <time> in batch <n>; a later change of it has waited since <time>: headquarters',
	'delivered, and changed since');

$central->answer('problem', status => 503, detail => 'closed on Sundays');
$central->listen;
comes_to_be_told('A-2',
	'Receipt A-2 (sale 2 of branch 7) has waited since <time>: the last attempt of its batch, at <time>, failed (http 503: closed on Sundays), and it will be tried again at <time>.',
	'headquarters do not take it');

$central->answer('reject', subjects => { 2 => 'price is negative' });
comes_to_be_told('A-2', 'Receipt A-2 (sale 2 of branch 7) was rejected by headquarters at <time> (price is negative, attempt <n> of 100); it will be tried again at <time>.', 'rejected');
comes_to_be_told('A-3', 'Receipt A-3 (sale 3 of branch 7) is at headquarters: it was delivered at <time> in batch <n>', 'the others went on');
$shop->change('UPDATE ventas SET total = 80 WHERE id_venta = 2');
comes_to_be_told('A-2', 'Receipt A-2 (sale 2 of branch 7) was rejected by headquarters at <time> (price is negative, attempt <n> of 100); it will be tried again at <time>; '
	  . 'a later change of it waits behind that.', 'and its correction waits');

$central->answer('receipt');
comes_to_be_told('A-2', 'Receipt A-2 (sale 2 of branch 7) is at headquarters, who took it at <time> after it had been rejected.', 'accepted in the end');
$shop->drains('all of it arrives');

$central->answer('conflict', subjects => { 4 => { id_venta => 4, total => 1 } });
sell(4, 'A-4');
comes_to_be_told('A-4', 'Receipt A-4 (sale 4 of branch 7) has been in conflict since <time>, because headquarters hold another version of it; it waits until somebody decides with softmobile.resolve_conflict(',
	'in conflict');
is($shop->sql('SELECT sum(count), sum(gaps), sum(duplicates), sum(total) FROM softmobile.folio_control'), '4|0|0|370', 'folio control, meanwhile');

$shop->stop;
done_testing();
